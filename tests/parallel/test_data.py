"""What each way of sharding over replicas holds and sends: measured, beside the formulas of its name."""

from __future__ import annotations

from typing import Any

import pytest
from tests.parallel import data_workers as workers
from tests.ranks import RankPool

BF16, FLOAT32 = "torch.bfloat16", "torch.float32"
# Bytes per parameter in bf16 over 2 replicas: working weights 2, masters 4, Adam's moments 8, gradients 4.
HELD = {
    "ddp": {"between steps": 2 + 4 + 8 + 4, "between micro-batches": 2 + 4 + 8 + 4},
    "zero1": {"between steps": 2 + 2 + 4 + 4, "between micro-batches": 2 + 2 + 4 + 4},
    "zero2": {"between steps": 2 + 4, "between micro-batches": 2 + 4 + 2 + 2},
    "zero3": {"between steps": 2 + 4, "between micro-batches": 2 + 4 + 2},
}


def layout(sharding: str, replicas: int = 2, **fields: Any) -> dict[str, Any]:
    return {"data_parallel_size": replicas, "data_parallel_sharding": sharding, **fields}


@pytest.fixture(scope="module")
def measured(ranks: RankPool) -> dict[str, list[dict[str, Any]]]:
    return {name: ranks.run(2, workers.hold_and_send, layout(name), {"dtype": "bf16"}) for name in HELD}


@pytest.mark.parametrize("sharding", HELD)
def test_each_rank_holds_what_the_name_says(
    measured: dict[str, list[dict[str, Any]]], sharding: str
) -> None:
    for rank in measured[sharding]:
        for moment, expected in HELD[sharding].items():
            assert rank[moment] == pytest.approx(expected, rel=0.04), moment


def test_only_zero3_frees_layers_while_others_run(measured: dict[str, list[dict[str, Any]]]) -> None:
    for zero2, zero3 in zip(measured["zero2"], measured["zero3"]):
        gathered = 2.0 * zero2["layers"]  # bytes per parameter that all layers take in bf16
        # One of four layers is there, or two while the next is fetched ahead.
        assert zero2["in a layer"] - zero3["in a layer"] >= 0.4 * gathered


def test_each_step_sends_what_the_name_says(measured: dict[str, list[dict[str, Any]]]) -> None:
    passes = workers.MICRO_BATCHES
    for rank in measured["ddp"]:
        assert rank["allreduce"] == {FLOAT32: pytest.approx(1.0)}
        assert not rank["allgather"] and not rank["reduce_scatter"]
    for rank in measured["zero1"]:  # gloo's reduce-scatter is an all-reduce
        assert rank["allreduce"] == {FLOAT32: pytest.approx(1.0)}
        assert rank["allgather"] == {BF16: pytest.approx(0.5)}
    for rank in measured["zero2"]:
        assert rank["reduce_scatter"] == {FLOAT32: pytest.approx(passes)}
        assert rank["allgather"] == {BF16: pytest.approx(0.5)}
    for rank in measured["zero3"]:
        assert rank["reduce_scatter"] == {FLOAT32: pytest.approx(passes)}
        layers, ends = rank["layers"], 1.0 - rank["layers"]
        assert rank["allgather"] == {BF16: pytest.approx(0.5 * passes * (2 * layers + ends), rel=1e-3)}


@pytest.mark.parametrize(("dtype", "times"), [("float32", 1), ("bf16", workers.MICRO_BATCHES)])
def test_hybrid_shards_in_groups_and_sums_over_them(ranks: RankPool, dtype: str, times: int) -> None:
    fields = layout("hybrid", 4, data_parallel_shard_size=2)
    precision = {"dtype": "bf16", "reduce_dtype": dtype}
    sent = {"float32": FLOAT32, "bf16": BF16}[dtype]
    for rank in ranks.run(4, workers.hold_and_send, fields, precision):
        assert rank["between steps"] == pytest.approx(HELD["zero3"]["between steps"], rel=0.04)
        assert rank["reduce_scatter"] == {sent: pytest.approx(workers.MICRO_BATCHES)}
        # In bf16 over groups in every micro-batch: what waits would be added up in bf16.
        assert rank["allreduce"] == {sent: pytest.approx(0.5 * times)}


@pytest.mark.parametrize("sharding", ["ddp", "zero1", "zero2"])
def test_gradients_travel_in_bf16_and_add_up_in_float32(ranks: RankPool, sharding: str) -> None:
    precision = {"dtype": "bf16", "reduce_dtype": "bf16"}
    kind = "reduce_scatter" if sharding == "zero2" else "allreduce"
    for rank in ranks.run(2, workers.hold_and_send, layout(sharding), precision):
        assert set(rank[kind]) == {BF16}
    for rank in ranks.run(2, workers.small_steps, layout(sharding), precision):
        assert rank["gradients"] == {FLOAT32}


@pytest.mark.parametrize("sharding", ["ddp", "zero1"])
def test_gradients_leave_while_the_last_backward_pass_goes_on(ranks: RankPool, sharding: str) -> None:
    for early, total in ranks.run(2, workers.when_messages_leave, sharding):
        assert early >= total // 2
        assert total > early


def test_the_first_layers_run_while_the_weights_of_the_last_are_under_way(ranks: RankPool) -> None:
    for first, last in ranks.run(2, workers.gathers_under_way):
        assert first >= 4
        assert last == 0
