import dataclasses

import pytest

from mtnlg.config import ConfigError, LayoutConfig, MegatronModelConfig, layout_problems
from mtnlg.parallel.mesh import resolve_layout

MODEL = MegatronModelConfig(
    vocab_size=32,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=6,
    intermediate_size=50,
    moe_intermediate_size=30,
    mlp_bias=False,
    num_experts=6,
)


def problems(model: MegatronModelConfig = MODEL, **fields: object) -> list[str]:
    return layout_problems(LayoutConfig(**fields), model, 24, 4)  # type: ignore[arg-type]


def test_what_divides_fits() -> None:
    assert problems(expert_parallel_size=3, data_parallel_size=6) == []
    assert problems(expert_parallel_size=6, data_parallel_size=3, context_parallel_size=2) == []
    assert problems(expert_parallel_size=2, data_parallel_size=2, tensor_parallel_size=3) == []


def test_a_dense_model_has_none_to_share() -> None:
    dense = dataclasses.replace(MODEL, num_experts=None, moe_intermediate_size=None)
    assert "has no experts" in problems(dense, expert_parallel_size=2, data_parallel_size=2)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(expert_parallel_size=4, data_parallel_size=4), "must divide model.num_experts (6)"),
        (
            dict(expert_parallel_size=3, data_parallel_size=4),
            "it must divide layout.data_parallel_size x layout.context_parallel_size (4)",
        ),
        (
            dict(
                expert_parallel_size=3,
                data_parallel_size=6,
                data_parallel_sharding="hybrid",
                data_parallel_shard_size=2,
            ),
            "layout.data_parallel_shard_size x layout.context_parallel_size (2)",
        ),
    ],
)
def test_what_does_not_divide_is_refused(fields: dict[str, object], message: str) -> None:
    (problem,) = problems(**fields)
    assert message in problem


def test_the_width_that_counts_is_that_of_the_experts() -> None:
    assert problems(tensor_parallel_size=3) == [], "no layer has an MLP of 50"
    narrow = dataclasses.replace(MODEL, moe_intermediate_size=31, num_dense_layers_first=1)
    named = [problem.split("model.")[-1] for problem in problems(narrow, tensor_parallel_size=3)]
    assert named == ["intermediate_size (50).", "moe_intermediate_size (31)."]


def test_ranks_that_are_known_only_later_are_refused_then() -> None:
    layout = LayoutConfig(expert_parallel_size=2)
    assert layout_problems(layout, MODEL, 24, 4) == []
    with pytest.raises(ConfigError, match="expert_parallel_size is 2"):
        resolve_layout(layout, "cpu")
