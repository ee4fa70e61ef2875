"""Ctrl-C and SIGTERM: the first one asks for an end after the step, a second Ctrl-C ends at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupts:
    """While this context is open, signals are remembered instead of ending the process.

    Args:
        say: told once when the first signal comes.

    Attributes:
        received: number of the first signal, 0 before there is one.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self.received = 0
        self._say = say
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in EXIT_CODES:
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:
                break  # not the main thread: whoever embeds us owns the signals
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and self._say is not None:
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            self._say(f"{name}: finishing this step and saving. Ctrl-C again stops at once.")
        self.received = self.received or number

    @staticmethod
    def exit_code(number: int) -> int:
        """The process's exit code after signal ``number``; 0 for none."""
        return EXIT_CODES.get(signal.Signals(number), 0) if number else 0
