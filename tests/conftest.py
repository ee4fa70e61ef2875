"""Makes ``tests`` importable, here and in the ranks, and the pool of ranks a fixture for all."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ranks import ranks

__all__ = ["ranks"]
