"""Which shardings, schedules and sizes do not go together, and what the messages say."""

from __future__ import annotations

from typing import Any

import pytest

from mtnlg.config import LayoutConfig, MegatronModelConfig, PrecisionConfig
from mtnlg.config.data_rules import data_parallel_problems, float8_problems


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"data_parallel_sharding": "hybrid", "data_parallel_size": 4}, "data_parallel_shard_size"),
        ({"data_parallel_shard_size": 2, "data_parallel_size": 4}, "leave it out or choose hybrid"),
        (
            {
                "data_parallel_sharding": "hybrid",
                "data_parallel_shard_size": 3,
                "data_parallel_size": 4,
            },
            "must divide layout.data_parallel_size (4)",
        ),
        *(
            (
                {
                    "data_parallel_sharding": sharding,
                    "data_parallel_size": 2,
                    "pipeline_parallel_size": 2,
                    "pipeline_schedule": schedule,
                },
                "use zero1 or ddp, or gpipe",
            )
            for sharding in ("zero2", "zero3")
            for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(fields: dict[str, Any], said: str) -> None:
    (problem,) = data_parallel_problems(LayoutConfig(**fields))
    assert said in problem


@pytest.mark.parametrize(
    "fields",
    [
        {"data_parallel_sharding": "hybrid", "data_parallel_shard_size": 2, "data_parallel_size": 4},
        {"data_parallel_sharding": "hybrid", "data_parallel_shard_size": 2, "data_parallel_size": None},
        {"data_parallel_sharding": "zero3", "data_parallel_size": 2, "pipeline_parallel_size": 2},
        {"pipeline_parallel_size": 2, "pipeline_schedule": "zbv", "data_parallel_size": 2},
    ],
)
def test_what_fits_is_let_through(fields: dict[str, Any]) -> None:
    assert data_parallel_problems(LayoutConfig(**fields)) == []


def test_sizes_that_8_bit_products_cannot_take_are_named() -> None:
    model = MegatronModelConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=72
    )
    precision = PrecisionConfig("bf16", fp8=True)
    (problem,) = float8_problems(LayoutConfig(), model, precision)
    assert "model.intermediate_size gives each rank's matrices a side of 72" in problem
    found = float8_problems(LayoutConfig(tensor_parallel_size=4), model, precision)
    assert [name in " ".join(found) for name in ("hidden_size", "num_attention_heads")] == [False, True]
    assert float8_problems(LayoutConfig(), model, PrecisionConfig("bf16")) == []
    layout = LayoutConfig(tensor_parallel_size=2, async_tensor_parallel=True)
    assert "async_tensor_parallel" in float8_problems(layout, model, precision)[0]
