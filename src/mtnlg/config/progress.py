"""How long work tells of its progress: one callable that every room may take and any caller may give."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called now and then during long work; the command line draws it as a bar with rate and ETA."""

    def __call__(self, stage: str, done: float, total: float | None, unit: str = "") -> None:
        """Report that ``done`` of ``total`` units of ``stage`` are finished.

        Args:
            stage: what is going on, e.g. ``"encoding"``; a new name begins a new bar.
            done: units finished so far.
            total: units in all; ``None`` while that is not known.
            unit: what is counted: ``"bytes"``, ``"documents"``, ``"tokens"``, ...
        """


def no_progress(stage: str, done: float, total: float | None, unit: str = "") -> None:
    """The silent ``Progress``, the default of every function that takes one."""
