"""Makes ``tests`` importable here and in the ranks, the pool of ranks a fixture, and chance repeat."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ranks import ranks

__all__ = ["ranks"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random inputs are the same in every run and in whatever order the tests are run."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(20)
