"""Loss and unclipped gradients of layouts beside one process; tests/parallel/matrix.py has many more."""

from typing import Any

import pytest
from tests.parallel.parity import BOUND, Case, compare
from tests.ranks import RankPool

CASES = [
    Case(tensor=2),
    Case(tensor=2, tied=False, layout={"sequence_parallel": False}, model={"parallel_output": False}),
    Case(tensor=2, family="llama", documents=True, switches={"activation_recomputation": "selective"}),
    Case(tensor=2, family="llama", tied=False, layout={"sequence_parallel": False}),
    Case(pipeline=2, documents=True),
    Case(pipeline=2, family="llama", tied=False, layout={"pipeline_schedule": "gpipe"}),
    Case(data=2, documents=True, switches={"activation_recomputation": "full"}),
    Case(data=2, family="llama", tied=False, layout={"data_parallel_sharding": "ddp"}),
    Case(tensor=2, pipeline=2, family="llama", documents=True),
    Case(tensor=2, pipeline=2, tied=False),
    Case(tensor=2, data=2, tied=False, layout={"data_parallel_sharding": "zero3"}),
    Case(tensor=2, data=2, family="llama", layout={"data_parallel_sharding": "ddp"}),
    Case(pipeline=2, data=2),
    Case(pipeline=2, micro_batches=1),  # fewer than stages, as in a batch-size ramp
    Case(pipeline=2, data=2, family="llama", tied=False, switches={"activation_recomputation": "full"}),
    Case(tensor=2, pipeline=2, data=2, documents=True),
    Case(tensor=2, pipeline=2, data=2, family="llama", tied=False),
]


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_has_the_loss_and_gradients_of_one_process(
    ranks: RankPool, references: dict[str, Any], case: Case
) -> None:
    difference = compare(ranks, case, references)
    assert difference.weights_equal, "the first weights are the same numbers"
    assert difference.gradient <= BOUND
    assert difference.loss <= BOUND
    assert difference.norm <= BOUND
    assert difference.tied_copies_equal
