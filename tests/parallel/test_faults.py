"""The silent faults of parallel training: samples lost or seen twice, and whether parity would notice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tests.parallel import fault_workers
from tests.parallel.fault_workers import Seen
from tests.parallel.parity import Case, compare
from tests.ranks import RankPool
from tests.training.helpers import small_config

from mtnlg.config import LayoutConfig, RunConfig, StopConfig

DP2 = LayoutConfig(data_parallel_size=2)
CP2 = LayoutConfig(context_parallel_size=2, data_parallel_size=1)
PP2_DP2 = LayoutConfig(pipeline_parallel_size=2, data_parallel_size=2)
TP2_DP2 = LayoutConfig(tensor_parallel_size=2, data_parallel_size=2, data_parallel_sharding="zero3")


def config_of(folder: Path, steps: int, layout: LayoutConfig) -> RunConfig:
    config = small_config(folder, layout=layout, stop=StopConfig(steps=steps))
    return replace(config, data=replace(config.data, split="1,0,0"))


def trained_on(ranks: RankPool, config: RunConfig, repeats_first_share: bool = False) -> Seen:
    seen: Seen = Counter()
    for found in ranks.run(
        config.layout.num_ranks, fault_workers.tokens_trained_on, config, repeats_first_share
    ):
        seen += found
    return seen


def test_every_token_is_trained_on_once_in_any_layout_and_after_changing_it(
    ranks: RankPool, tmp_path: Path
) -> None:
    """A run that changes its layout at every second step sees what one process sees, step by step."""
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    expected = trained_on(ranks, config_of(tmp_path / "one", 8, LayoutConfig(data_parallel_size=1)))
    assert sum(expected.values()) == 8 * 8 * 16  # steps, samples, tokens
    seen: Seen = Counter()
    for steps, layout in ((2, DP2), (4, CP2), (6, PP2_DP2), (8, TP2_DP2)):
        seen += trained_on(ranks, config_of(tmp_path / "many", steps, layout))
    assert seen == expected


def test_replicas_that_read_the_same_samples_are_noticed(ranks: RankPool, tmp_path: Path) -> None:
    """The test above would fail: it sees tokens, not only how many."""
    right = trained_on(ranks, config_of(tmp_path, 1, LayoutConfig(data_parallel_size=1)))
    (tmp_path / "wrong").mkdir()
    wrong = trained_on(ranks, config_of(tmp_path / "wrong", 1, DP2), repeats_first_share=True)
    assert sum(wrong.values()) == sum(right.values())
    assert wrong != right


@pytest.mark.parametrize(
    ("fault", "layout", "noticed"),
    [
        ("gradients are averaged", {"data": 2}, "gradient"),
        ("samples are doubled", {"data": 2}, "loss"),
        ("norm counts copies", {"tensor": 2}, "norm"),
        ("a rank steps apart", {"data": 2, "layout": {"data_parallel_sharding": "ddp"}}, "copies differ"),
    ],
)
def test_parity_notices(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch, fault: str, layout: dict[str, int], noticed: str
) -> None:
    case = Case(**layout)  # type: ignore[arg-type]
    run = ranks.run

    def run_with_fault(size, function, *args, timeout=180.0):  # type: ignore[no-untyped-def]
        if size > 1:
            return run(size, fault_workers.run_with_fault, fault, *args, timeout=timeout)
        return run(size, function, *args, timeout=timeout)

    assert compare(ranks, case).problems(case) == []
    monkeypatch.setattr(ranks, "run", run_with_fault)
    try:
        problems = compare(ranks, case).problems(case)
    except AssertionError as error:
        problems = [str(error)]
    assert any(noticed in problem or "counted twice" in problem for problem in problems), problems
