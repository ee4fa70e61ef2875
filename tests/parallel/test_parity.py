"""Layouts beside one process: the slice of the matrix that every test run takes (tests/parallel/matrix.py
runs all of it)."""

from typing import Any

import pytest
from tests.parallel.cases import cases_of, topics
from tests.parallel.parity import Case, compare
from tests.ranks import RankPool

SLICE = sorted((case for topic in topics() for case in cases_of(topic)), key=lambda case: case.size)


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("case", SLICE, ids=lambda case: case.name)
def test_layout_is_the_model_of_one_process(
    ranks: RankPool, references: dict[str, Any], case: Case
) -> None:
    assert compare(ranks, case, references).problems(case) == []
