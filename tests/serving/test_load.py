"""Clients that behave and misbehave, in small; the whole: python -m tests.serving.load."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.serving.load import run_load


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_good_requests_are_answered_right_among_bad_ones_and_nothing_is_left(tmp_path: Path) -> None:
    report = run_load(tmp_path, 300, 16)
    assert report.problems == []
    assert sum(report.counts.values()) == 300
