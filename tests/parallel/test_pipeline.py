"""What pipelines promise besides parity (tests/parallel/cases/pipeline.py has that)."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.parallel import pipeline_workers, workers
from tests.parallel.parity import BOUND, GPT, layout_fields
from tests.parallel.test_checkpoints import assert_bit_equal, merged
from tests.ranks import RankPool

from mtnlg.config import LayoutConfig, layout_problems
from mtnlg.config.layout import LOOPED_SCHEDULES, PIPELINE_SCHEDULES, V_SCHEDULES
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.pipeline_rules import takes
from mtnlg.config.training import TrainingConfig
from mtnlg.parallel import pipeline

FIVE = {**GPT, "num_hidden_layers": 5}
PP2 = layout_fields(1, 2, 1)


@pytest.mark.parametrize(
    ("division", "message"),
    [
        ([[0, 1], [2, 4]], "layer 3 0 times"),
        ([[0, 1], [1, 2, 3, 4]], "layer 1 2 times"),
    ],
)
def test_a_dropped_or_doubled_layer_is_noticed_on_every_rank(
    ranks: RankPool, division: list[list[int]], message: str
) -> None:
    layout = {**PP2, "pipeline_layout": [2, 3]}
    errors = ranks.run(2, pipeline_workers.build_with_wrong_division, FIVE, layout, 1, division)
    assert all(message in error for error in errors), errors
    right = [[0, 1], [2, 3, 4]]
    assert ranks.run(2, pipeline_workers.build_with_wrong_division, FIVE, layout, 1, right) == ["", ""]


def torch_takes(layout: LayoutConfig, count: int) -> bool:
    """Whether torch makes the schedule for so many micro-batches."""
    size = layout.pipeline_parallel_size
    stages = [
        SimpleNamespace(
            stage_index=number,
            num_stages=layout.num_stages,
            group_size=size,
            group_rank=0,
            submod=None,
            is_last=False,
            has_backward=True,
        )
        for number in layout.stages_of_rank(0)
    ]
    name = layout.pipeline_schedule
    try:
        if name in pipeline._ONE_STAGE:
            pipeline._ONE_STAGE[name](stages[0], count)  # type: ignore[arg-type]
        else:
            pipeline._SEVERAL_STAGES[name](stages, count)  # type: ignore[arg-type]
    except (ValueError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_what_a_schedule_takes_is_known_before_torch_is_asked(schedule: str) -> None:
    several = {"stages_per_rank": 3} if schedule in LOOPED_SCHEDULES else {}
    for size, count in product((2, 3, 4), range(1, 14)):
        layout = LayoutConfig(pipeline_parallel_size=size, pipeline_schedule=schedule, **several)
        assert takes(layout, count) == torch_takes(layout, count), (size, count)
        runs = pipeline.runs_of(layout, count)
        assert sum(number for _, number in runs) == count
        assert (runs == [(schedule, count)]) == takes(layout, count)
        for name, number in runs:
            other = LayoutConfig(pipeline_parallel_size=size, pipeline_schedule=name, **several)
            assert other.stages_of_rank(1) == layout.stages_of_rank(1)
            assert torch_takes(other, number)


def problems(micro_batches: int = 8, switches: dict[str, Any] | None = None, **layout: Any) -> list[str]:
    model = MegatronModelConfig(**FIVE)
    fields = {"pipeline_parallel_size": 2, **layout}
    training = TrainingConfig(**(switches or {}))
    return layout_problems(LayoutConfig(**fields), model, 8, micro_batches, training)


def test_what_a_schedule_cannot_run_is_refused_with_a_way_out() -> None:
    assert "at least as many micro-batches a step as stages, and has 1" in problems(1)[0]
    (few,) = problems(3, pipeline_schedule="dualpipev")
    assert "stages (4), and has 3" in few and "pipeline_schedule: zbv" in few
    (odd,) = problems(7, pipeline_schedule="interleaved_1f1b")
    assert "7 micro-batches" in odd and "3 equal rounds" in odd and "looped_bfs" in odd
    assert problems(1, pipeline_schedule="zbv") == problems(1, pipeline_schedule="gpipe") == []
    three = problems(pipeline_schedule="zbv", stages_per_rank=3)
    assert "zbv runs 2 stages on each rank" in three[-1]
    assert "1f1b runs 1 stage on each rank" in problems(stages_per_rank=2)[0]
    assert "needs layout.pipeline_parallel_size" in problems(pipeline_parallel_size=1, stages_per_rank=2)[0]


@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_split_backward_passes_exclude_what_runs_a_graph_once(schedule: str) -> None:
    splits = schedule in (*V_SCHEDULES, "interleaved_zero_bubble")
    for switches in ({"activation_recomputation": "full"}, {"compile": True}):
        found = problems(switches=switches, pipeline_schedule=schedule)
        assert len(found) == splits
        assert not found or "interleaved_1f1b" in found[0]
    assert problems(switches={"activation_recomputation": "selective"}, pipeline_schedule=schedule) == []
    for sharding in ("ddp", "zero1", "zero2", "zero3"):
        layout = {"data_parallel_sharding": sharding, "data_parallel_size": 2}
        found = problems(pipeline_schedule=schedule, **layout)
        assert len(found) == (splits and sharding in ("zero2", "zero3"))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "dualpipev", "1f1b"])
def test_a_ramp_and_samples_are_those_of_one_process(ranks: RankPool, schedule: str) -> None:
    counts = [1, 3, 4, 4, 7]  # micro-batches of each step; some schedules take only some of them
    one = ranks.run(1, pipeline_workers.train_and_sample, FIVE, layout_fields(1, 1, 1), counts)[0]
    layout = {**PP2, "pipeline_schedule": schedule}
    first, last = ranks.run(2, pipeline_workers.train_and_sample, FIVE, layout, counts)
    assert first["losses"] == last["losses"] == pytest.approx(one["losses"], rel=BOUND)
    assert first["tokens"] == one["tokens"]
    names = [name for rank in (first, last) for name in rank["names"]]
    assert len(set(first["names"])) == len(first["names"])
    twice = schedule not in V_SCHEDULES  # a tied embedding's copies on two ranks
    assert sorted(names) == sorted(one["names"] + ["embedding.tokens.weight"] * twice)


CHAIN = [
    layout_fields(1, 1, 1),
    {**PP2, "pipeline_schedule": "zbv"},
    {**layout_fields(1, 2, 2), "pipeline_schedule": "interleaved_1f1b", "pipeline_layout": "Et|tt|t|tL"},
    {**layout_fields(2, 2, 1), "pipeline_schedule": "dualpipev"},
    {**PP2, "pipeline_layout": [4, 1]},
    layout_fields(1, 1, 1),
]


def test_checkpoints_continue_in_any_division(ranks: RankPool, tmp_path: Path) -> None:
    run, optimizer = workers.continue_training, {"name": "adamw"}
    straight = ranks.run(1, run, FIVE, CHAIN[0], optimizer, str(tmp_path / "straight"), 0, len(CHAIN))[0]
    saved: dict[str, Any] = {}
    for step, layout in enumerate(CHAIN):
        size = LayoutConfig(**layout).num_ranks
        results = ranks.run(size, run, FIVE, layout, optimizer, str(tmp_path / "chain"), step, 1)
        if step:
            assert_bit_equal(results, saved)
        saved = merged(results)
        for result in results:
            assert result["losses"][0] == pytest.approx(straight["losses"][step], rel=BOUND)
            assert result["norms"][0] == pytest.approx(straight["norms"][step], rel=10 * BOUND)
