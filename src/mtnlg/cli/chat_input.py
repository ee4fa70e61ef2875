"""How ``mtnlg chat`` reads what a person types: with editing, history and completion, or line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mtnlg.cli.chat_files import history_file
from mtnlg.cli.chat_screen import is_capable
from mtnlg.config.errors import ConfigError

if TYPE_CHECKING:
    from mtnlg.cli.chat_session import ChatSession

PROMPT = "> "
MORE = ". "


class Reader(Protocol):
    """Gets messages and commands from a person."""

    def read(self, default: str = "") -> str:
        """One message, of any number of lines.

        Args:
            default: text to begin with, where it can be edited.

        Raises:
            EOFError: the person leaves (Ctrl-D, end of input).
            KeyboardInterrupt: the line is given up (Ctrl-C).
        """

    @property
    def can_edit(self) -> bool:
        """Whether ``default`` is shown to be edited."""


def read_utf8() -> None:
    """Let stdin be UTF-8 whatever the locale is; :func:`whole_text` finds bytes that are not."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def whole_text(text: str) -> str:
    """``text`` without the end of its last line.

    Raises:
        ConfigError: it came from bytes that are no UTF-8.
    """
    wrong = next((at for at, letter in enumerate(text) if "\udc80" <= letter <= "\udcff"), None)
    if wrong is not None:
        before = text[max(0, wrong - 20) : wrong].rpartition("\n")[2]
        where = f"after {before!r}" if before else "at the beginning"
        raise ConfigError(
            f"the input is not UTF-8: byte 0x{ord(text[wrong]) - 0xDC00:02x} {where}. Convert it first, as "
            "with iconv -f GB18030 -t UTF-8."
        )
    return text.removesuffix("\n").removesuffix("\r")


@contextmanager
def keys_unseen() -> Iterator[None]:
    """While this lasts, what is typed is not written into the answer; it waits for the next line."""
    try:
        import termios
    except ImportError:  # not on this system
        yield
        return
    try:
        before = termios.tcgetattr(sys.stdin)
    except (termios.error, OSError, ValueError, TypeError):  # no terminal
        yield
        return
    unseen = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def make_reader(session: ChatSession, keep_history: bool = True) -> Reader:
    """The reader that fits the terminal."""
    if is_capable(sys.stdout):
        return PromptReader(session, history_file() if keep_history else None)
    return LineReader()


class LineReader:
    """Plain lines; one that ends with a backslash goes on in the next."""

    can_edit = False

    def read(self, default: str = "") -> str:
        """See :class:`Reader`."""
        lines: list[str] = []
        while True:
            sys.stderr.write(MORE if lines else PROMPT)
            sys.stderr.flush()
            line = sys.stdin.readline()
            if not line:
                raise EOFError
            text = line.removesuffix("\n").removesuffix("\r")
            lines.append(text.removesuffix("\\"))
            if not text.endswith("\\"):
                return whole_text("\n".join(lines))


class PromptReader:
    """A line editor with history, completion of commands, and pasted or typed lines.

    Args:
        session: whose commands are completed.
        history: a file that keeps what was typed; ``None`` keeps it for this time only.
    """

    can_edit = True

    def __init__(self, session: ChatSession, history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
        from prompt_toolkit.output.color_depth import ColorDepth

        from mtnlg.cli.terminal import note

        store, problem = _history(history)
        if problem:
            note(f"note: what you type is not remembered: {problem}")
        self._prompt: Any = PromptSession(
            history=store,
            completer=_completer(session),
            complete_while_typing=False,
            auto_suggest=AutoSuggestFromHistory(),
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation=_continuation,
            color_depth=ColorDepth.from_env(),  # NO_COLOR
            enable_open_in_editor=True,
        )

    def read(self, default: str = "") -> str:
        """See :class:`Reader`."""
        return str(self._prompt.prompt(PROMPT, default=default))


def _continuation(_width: int, _line: int, num_wraps: int) -> str:
    """What stands before a line that the person began; one that is only too long goes on without."""
    return " " * len(MORE) if num_wraps else MORE


def _history(file: Path | None) -> tuple[Any, str]:
    """What keeps the typed lines, and why not in the file."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if file is None:
        return InMemoryHistory(), ""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        with file.open("ab"):
            return FileHistory(str(file)), ""
    except OSError as error:
        return InMemoryHistory(), f"{error.strerror}: {file}"


def _keys() -> Any:
    """Enter sends; Alt+Enter begins a new line, as does Enter after a backslash.

    What is typed while an answer comes arrives with Enter as a line feed (Ctrl-J), which so sends, too.
    """
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def send(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion is not None:
            buffer.complete_state = None
        elif buffer.document.char_before_cursor == "\\" and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(session: ChatSession) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        """A command's name, and what may follow it."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterable[Completion]:
            text = document.text_before_cursor
            if not text.startswith("/") or "\n" in text:
                return
            words = session.completions(text)
            if words is None:
                part = text.partition(" ")[2]
                yield from paths.get_completions(Document(part, len(part)), complete_event)
                return
            word = text.rpartition(" ")[2]
            for name in words:
                if name.startswith(word):
                    yield Completion(name, start_position=-len(word))

    return Commands()
