"""What ``mtnlg chat`` shows: colours on a terminal that has them, plain lines on any other."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import IO, Any

# What a model writes must not move the cursor or colour the screen: control characters become visible.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_VISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)  # turn text around


LEAST_MEANING = 24  # columns that a table's text needs beside the names


def write_what_fits() -> None:
    """Let stdout and stderr replace what their encoding (the locale's) has no letter for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def make_screen() -> Screen:
    """The screen that fits where stdout goes."""
    return RichScreen() if is_capable(sys.stdout) else Screen()


def is_capable(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that understands more than plain text."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown", "")


def visible(text: str) -> str:
    """``text`` with its control characters shown instead of obeyed."""
    return text.translate(_VISIBLE)


class Screen:
    """Plain lines: answers on stdout, everything else on stderr."""

    def note(self, text: str) -> None:
        """Something the person should know."""
        print(visible(text), file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Something that went wrong."""
        print(f"error: {visible(text)}", file=sys.stderr, flush=True)

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what they mean."""
        width = max((len(name) for name, _ in rows), default=0)
        for name, text in rows:
            self.note(f"  {name:<{width}}  {text}".rstrip())

    def message(self, name: str, text: str) -> None:
        """A message of the conversation so far."""
        self.note(f"{name}{text}")

    def begin_answer(self, name: str) -> None:
        """The model begins to speak."""

    def piece(self, text: str) -> None:
        """It goes on."""
        sys.stdout.write(visible(text))
        sys.stdout.flush()

    def end_answer(self, remark: str = "") -> None:
        """It is done; ``remark`` says how, if there is something to say."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        if remark:
            self.note(f"[{remark}]")


class RichScreen(Screen):
    """A terminal: names in colour (unless ``NO_COLOR`` is set), notes dimmed."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Any = Console(highlight=False)

    def note(self, text: str) -> None:
        """See :class:`Screen`."""
        self._console.print(visible(text), style="dim", markup=False, overflow="fold")

    def error(self, text: str) -> None:
        """See :class:`Screen`."""
        self._console.print(f"error: {visible(text)}", style="red", markup=False, overflow="fold")

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """See :class:`Screen`."""
        from rich.cells import cell_len
        from rich.table import Table

        names = max((cell_len(name) for name, _ in rows), default=0)
        texts = max((cell_len(text) for _, text in rows), default=0)
        if names + 2 + min(texts, LEAST_MEANING) > self._console.width:
            for name, text in rows:
                self._console.print(visible(name), style="cyan", markup=False, overflow="fold")
                self._console.print(visible(f"  {text}"), style="dim", markup=False, overflow="fold")
            return
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(style="dim", overflow="fold")
        for name, text in rows:
            table.add_row(*map(_escaped, (name, text)))
        self._console.print(table)

    def message(self, name: str, text: str) -> None:
        """See :class:`Screen`."""
        self._console.print(visible(name), style="bold cyan", end="", markup=False, soft_wrap=True)
        self._console.print(visible(text), markup=False, soft_wrap=True)

    def begin_answer(self, name: str) -> None:
        """See :class:`Screen`."""
        self._console.print(visible(name), style="bold green", end="", markup=False, soft_wrap=True)
        self._console.file.flush()


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(visible(text))
