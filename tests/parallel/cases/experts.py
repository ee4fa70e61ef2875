"""Mixtures of experts in every layout, their experts divided or not."""

from __future__ import annotations

from typing import Any

from tests.parallel.parity import Case

BIAS: dict[str, Any] = dict(
    router_load_balancing="bias", router_score_function="sigmoid", router_bias_update_rate=0.05
)
# Rounded hidden states send some tokens to other experts: one process in bf16 differs by 0.09 as well.
BF16_BOUND = 0.1
SHARDINGS = ("ddp", "zero1", "zero2", "zero3")


def moe(**fields: Any) -> Case:
    return Case(family="moe", **fields)


SLICE = [
    moe(tensor=2, tied=False),
    moe(pipeline=2, model=BIAS, switches={"activation_recomputation": "full"}),
    moe(data=2, expert=2, tied=False, model=BIAS, layout={"data_parallel_sharding": "zero3"}),
    moe(context=2, expert=2, documents=True),
    moe(tensor=2, data=2, expert=2, layout={"data_parallel_sharding": "zero3"}),
]

CASES = [
    moe(data=4, expert=2, layout={"data_parallel_sharding": "zero2"}),
    *[moe(data=2, layout={"data_parallel_sharding": kind}) for kind in SHARDINGS],
    *[moe(data=2, expert=2, layout={"data_parallel_sharding": kind}) for kind in SHARDINGS],
    *[moe(data=4, expert=2, model=BIAS, layout={"data_parallel_sharding": kind}) for kind in SHARDINGS],
    *[moe(data=4, expert=4, layout={"data_parallel_sharding": kind}) for kind in SHARDINGS],
    *[moe(tensor=2, data=2, expert=2, layout={"data_parallel_sharding": kind}) for kind in SHARDINGS],
    *[moe(pipeline=2, data=2, expert=2, layout={"data_parallel_sharding": kind}) for kind in SHARDINGS],
    moe(data=2, expert=2, precision={"dtype": "bf16"}, bound=BF16_BOUND),
    moe(
        data=4,
        expert=2,
        precision={"dtype": "bf16"},
        layout={"data_parallel_sharding": "zero3"},
        bound=BF16_BOUND,
    ),
    moe(
        data=8,
        expert=4,
        layout={"data_parallel_sharding": "hybrid", "data_parallel_shard_size": 4},
    ),
    moe(data=8, expert=2, model={"num_experts": 2}, layout={"data_parallel_sharding": "zero3"}),
    moe(tensor=2, layout={"sequence_parallel": False}, model=BIAS),
    moe(tensor=2, data=2, expert=2, layout={"sequence_parallel": False}, tied=False),
    moe(tensor=2, data=4, expert=2, model=BIAS, documents=True),
    moe(tensor=2, context=2, data=2, expert=4),
    moe(tensor=2, pipeline=2, data=2, expert=2, switches={"activation_recomputation": "full"}),
    moe(tensor=2, pipeline=2, context=2, expert=2, model=BIAS),
    moe(context=2, model=BIAS, layout={"context_parallel_method": "all_to_all"}),
    moe(context=2, data=2, expert=4, documents=True, layout={"data_parallel_sharding": "zero3"}),
    moe(pipeline=2, data=2, expert=2, model=BIAS, layout={"pipeline_schedule": "interleaved_1f1b"}),
    moe(pipeline=2, data=2, expert=2, model=BIAS, layout={"pipeline_schedule": "interleaved_zero_bubble"}),
    moe(pipeline=2, data=2, expert=2, model=BIAS, layout={"pipeline_schedule": "zbv"}),
    moe(pipeline=2, data=2, expert=2, model=BIAS, layout={"pipeline_schedule": "dualpipev"}),
    moe(data=2, expert=2, switches={"activation_recomputation": "selective"}),
    moe(data=2, expert=2, switches={"activation_recomputation": "operators"}),
    moe(data=2, expert=2, model={"moe_layer_interval": 2, "activation_function": "gelu"}),
]
