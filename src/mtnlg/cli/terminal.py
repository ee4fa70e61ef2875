"""What the command line shows: progress with rate and ETA, tables, notes.

On a terminal progress is a live ``rich`` bar; elsewhere (a log, a pipe, CI) plain lines appear now
and then. Both go to stderr, so that a verb's results on stdout can be piped on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

QUIET_SECONDS = 2.0  # work shorter than this needs no progress
PLAIN_INTERVAL_SECONDS = 10.0  # between the lines of a log


class ProgressDisplay:
    """Draws what a ``mtnlg.config.progress.Progress`` reports; also a context manager.

    Args:
        stream: where to draw; ``None`` is stderr.
        plain_interval_seconds: time between two lines where there is no terminal.
    """

    def __init__(
        self, stream: IO[str] | None = None, plain_interval_seconds: float = PLAIN_INTERVAL_SECONDS
    ) -> None:
        self._stream = stream or sys.stderr
        self._interval = plain_interval_seconds
        self._live: Any = None
        self._task: Any = None
        self._stage: str | None = None
        self._began = self._told = 0.0
        self._last: tuple[float, float | None, str] = (0.0, None, "")

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def __call__(self, stage: str, done: float, total: float | None, unit: str = "") -> None:
        """Show that ``done`` of ``total`` units of ``stage`` are finished."""
        now = time.monotonic()
        if stage != self._stage:
            self.finish()
            self._stage, self._began, self._told = stage, now, now
        self._last = (done, total, unit)
        if total is not None and done >= total:
            self.finish()
        elif self._stream.isatty():
            self._draw(now)
        elif now - self._told >= self._interval:
            self._told = now
            self._say(now)

    def finish(self) -> None:
        """End the stage that is going on: take its bar away, or write its last plain line."""
        if self._live is not None:
            self._live.stop()
            self._live = self._task = None
        if self._stage is not None and time.monotonic() - self._began >= QUIET_SECONDS:
            self._say(time.monotonic(), finished=True)
        self._stage = None

    def _say(self, now: float, finished: bool = False) -> None:
        done, total, unit = self._last
        seconds = max(now - self._began, 1e-9)
        parts = [f"{self._stage}: {quantity(done, unit)}"]
        if total and not finished:
            parts = [f"{self._stage}: {quantity(done, '')} of {quantity(total, unit)} ({done / total:.0%})"]
        parts.append(f"{quantity(done / seconds, unit)}/s")
        if finished:
            parts.append(f"in {duration(seconds)}")
        elif total and done:
            parts.append(f"{duration(seconds * (total - done) / done)} left")
        print(", ".join(parts), file=self._stream, flush=True)

    def _draw(self, now: float) -> None:
        if self._live is None:
            if now - self._began < 0.2:
                return
            self._live = _bar(self._stream)
            self._task = self._live.add_task(self._stage, total=None, amount="", rate="")
            self._live.start()
        done, total, unit = self._last
        rate = f"{quantity(done / max(now - self._began, 1e-9), unit)}/s"
        amount = quantity(done, unit) if total is None else f"{quantity(done, '')}/{quantity(total, unit)}"
        self._live.update(self._task, completed=done, total=total, amount=amount, rate=rate)


def _bar(stream: IO[str]) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[rate]}", style="cyan"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        transient=True,
    )


def quantity(value: float, unit: str) -> str:
    """``1234567, "tokens"`` as ``"1.23M tokens"``; bytes as ``"1.2 MB"``."""
    if unit == "bytes":
        for size, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
            if value >= size:
                return f"{value / size:.1f} {name}"
        return f"{value:.0f} bytes"
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scaled = value / (1e3 if name == "k" else size)
            return f"{scaled:.3g}{name} {unit}".rstrip()
    text = f"{value:.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def duration(seconds: float) -> str:
    """``75.0`` as ``"1 min 15 s"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def note(message: str) -> None:
    """One line for the user on stderr."""
    print(message, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table on stdout: drawn by ``rich`` on a terminal, aligned plain text elsewhere."""
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, title=title or None)
        for row in cells:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    if title:
        print(title)
    for row in [list(columns), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
