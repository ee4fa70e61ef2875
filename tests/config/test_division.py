"""Which layers each pipeline stage runs."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtnlg.config import ConfigError, LayoutConfig, MegatronModelConfig, layout_problems
from mtnlg.config.division import divide_by_cost, layers_of_stages
from mtnlg.config.load import load_run_config
from mtnlg.config.pipeline_notation import parse_stages


def model(layers: int, **fields: object) -> MegatronModelConfig:
    fields = {"vocab_size": 101, "hidden_size": 48, "num_attention_heads": 6, **fields}
    return MegatronModelConfig(num_hidden_layers=layers, **fields)  # type: ignore[arg-type]


def counts(layers: int, **layout: object) -> list[int]:
    division = layers_of_stages(model(layers), LayoutConfig(**layout))  # type: ignore[arg-type]
    assert [index for part in division for index in part] == list(range(layers)), "each once, in order"
    return [len(part) for part in division]


def problems(layers: int, micro_batches: int = 64, **layout: object) -> list[str]:
    return layout_problems(LayoutConfig(**layout), model(layers), 16, micro_batches)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Et*3|(tt|)*2,L", ["Ettt", "tt", "tt", "L"]),
        ("E|t|L", ["E", "t", "L"]),
        ("E,(t|)*3 tL", ["Et", "t", "t", "tL"]),
        ("Et(|ttt)*2|L", ["Et", "ttt", "ttt", "L"]),
        ("E(t*2|)*2L", ["Ett", "tt", "L"]),
        ("Et|*2tL", ["Et", "", "tL"]),
        ("E((t|)*2t|)*2L", ["Et", "t", "t", "t", "t", "t", "L"]),
    ],
)
def test_notation(text: str, stages: list[str]) -> None:
    assert parse_stages(text) == stages


@pytest.fixture(scope="module")
def megatron_layout() -> Any:
    name = "megatron.core.transformer.pipeline_parallel_layer_layout"
    return pytest.importorskip(name).PipelineParallelLayerLayout


@given(text=st.text(alphabet="Etm|L,(*)2103", max_size=24))
@example(text="Et*3|(tt|)*29,m|L")
def test_notation_means_what_megatron_says(megatron_layout: Any, text: str) -> None:
    letters = {"embedding": "E", "decoder": "t", "loss": "L", "mtp": "m"}
    try:
        ours = parse_stages(text)
    except ValueError:
        return
    try:
        theirs = megatron_layout.parse_str_to_list(text)
    except AssertionError:
        return  # it knows no nested groups and no group without a repetition
    assert ours == ["".join(letters[item.name] for item in stage) for stage in theirs]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Et*3|(tt|)*29,m|L", "multi-token prediction (m) is no part of this model"),
        ("Etx|L", "'x' at character 3 means nothing"),
        ("Et)|L", "')' at character 3 closes nothing"),
        ("(Et|L", "a '(' is not closed"),
        ("Et*|L", "'*' at character 3 needs a number"),
        ("tt|L", "one E (embedding), at its beginning"),
        ("tE|L", "one E (embedding), at its beginning"),
        ("Et|t", "one L (head and loss), at its end"),
        ("EtL|t", "one L (head and loss), at its end"),
        ("", "one E (embedding), at its beginning"),
        ("Et*999999999L", "more than 100000 layers"),
        ("E(((t*999)*999)*999)*999L", "more than 100000 layers"),
        ("E" + "(" * 5000, "nests more than 10 parentheses"),
    ],
)
def test_what_is_not_in_the_notation_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LayoutConfig(pipeline_parallel_size=2, pipeline_layout=text)
    assert reason in str(caught.value)


def test_command_line_and_recipe_take_both_forms(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stop: {steps: 1}\nmodel: {vocab_size: 50, num_hidden_layers: 7}\n"
        "layout: {pipeline_parallel_size: 2, pipeline_layout: [2, 5], data_parallel_size: 1}\n"
    )
    assert load_run_config(recipe).layout.pipeline_layout == [2, 5]
    for text, value in (("[3,4]", [3, 4]), ("Et*3|t*4L", "Et*3|t*4L"), ("null", None)):
        assert load_run_config(recipe, [f"layout.pipeline_layout={text}"]).layout.pipeline_layout == value
    with pytest.raises(ConfigError, match="'x' at character 2 means nothing"):
        load_run_config(recipe, ["layout.pipeline_layout=Ex|L"])


def test_three_ways_to_divide() -> None:
    assert counts(10, pipeline_parallel_size=4) == [2, 3, 3, 2]
    assert counts(10, pipeline_parallel_size=4, pipeline_layout=[1, 4, 4, 1]) == [1, 4, 4, 1]
    assert counts(10, pipeline_parallel_size=4, pipeline_layout="E|(t*5|)*2,L") == [0, 5, 5, 0]


def test_stages_of_a_rank_follow_from_the_layout() -> None:
    layout = LayoutConfig(
        pipeline_parallel_size=2, pipeline_schedule="looped_bfs", pipeline_layout="Et|(t|)*4L"
    )
    assert layout.num_chunks == 3
    assert layout.stages_of_rank(1) == [1, 3, 5]
    assert (
        problems(5, pipeline_parallel_size=2, pipeline_schedule="zbv", pipeline_layout=[2, 1, 2, 0]) == []
    )


@pytest.mark.parametrize("schedule", ["1f1b", "looped_bfs", "zbv"])
def test_each_stage_has_one_rank(schedule: str) -> None:
    layout = LayoutConfig(pipeline_parallel_size=3, pipeline_schedule=schedule)
    held = {stage: rank for rank in range(3) for stage in layout.stages_of_rank(rank)}
    assert held == {stage: layout.rank_of_stage(stage) for stage in range(layout.num_stages)}


def test_a_layout_that_does_not_fit_the_model_or_the_ranks_is_refused() -> None:
    stated = problems(10, pipeline_parallel_size=4, pipeline_layout=[4, 4, 4])
    assert "describes 3 stages and the layout has 4 (pipeline_parallel_size 4 x 1" in stated[0]
    assert "has 12 layers and the model 10" in stated[1]
    (idle,) = problems(10, pipeline_parallel_size=4, pipeline_layout="Et*5|t*5||L")
    assert "stage 2 (counted from 0) would have nothing to do" in idle
    (idle,) = problems(6, pipeline_parallel_size=3, pipeline_layout=[0, 0, 6])
    assert "stage 1 " in idle
    (several,) = problems(4, pipeline_parallel_size=2, pipeline_layout=[1, 1, 1, 1])
    assert "4 stages and the layout has 2" in several
    (few,) = problems(3, pipeline_parallel_size=2, pipeline_schedule="interleaved_1f1b")
    assert "4 (pipeline_parallel_size 2 x 2 for each rank) are more stages than" in few
    with pytest.raises(ConfigError, match="number of layers of each stage"):
        LayoutConfig(pipeline_layout=[3, -1])
    assert problems(5, pipeline_layout=[5]) == problems(5, pipeline_layout="Et*5L") == []
    assert "has 4 layers" in problems(5, pipeline_layout=[4])[0]


def heaviest(division: list[int], costs: list[float], first: float, last: float) -> float:
    work, start = [], 0
    for count in division:
        work.append(sum(costs[start : start + count]))
        start += count
    work[0] += first
    work[-1] += last
    return max(work)


@given(
    costs=st.lists(st.integers(1, 9).map(float), min_size=1, max_size=9),
    stages=st.integers(1, 5),
    first=st.integers(0, 20),
    last=st.integers(0, 20),
)
def test_no_division_has_a_lighter_heaviest_stage(
    costs: list[float], stages: int, first: int, last: int
) -> None:
    stages = min(stages, len(costs))
    division = divide_by_cost(costs, stages, first, last)
    assert len(division) == stages and sum(division) == len(costs) and min(division) >= 1
    cuts = combinations(range(1, len(costs)), stages - 1)
    all_divisions = ([end - start for start, end in zip((0, *cut), (*cut, len(costs)))] for cut in cuts)
    best = min(heaviest(other, costs, first, last) for other in all_divisions)
    assert heaviest(division, costs, first, last) == best


def test_layers_with_experts_cost_what_a_token_meets_of_them() -> None:
    fields = dict(num_experts=8, num_experts_per_token=4, num_dense_layers_first=6, mlp_bias=False)
    moe = model(10, **fields, pre_process_first=False, post_process_last=False)
    assert moe.num_active_parameters_of_layer(9) > 2 * moe.num_active_parameters_of_layer(0)
    division = layers_of_stages(moe, LayoutConfig(pipeline_parallel_size=2))
    assert [len(part) for part in division] == [7, 3]


def test_measured_costs_can_divide() -> None:
    assert divide_by_cost([5.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2) == [1, 5]
    assert divide_by_cost([1.0] * 6, 2, first=2.0) == [2, 4]
    assert divide_by_cost([1.0] * 7, 3) == [2, 2, 3]  # earlier stages hold more micro-batches
