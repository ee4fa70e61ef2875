"""The ``mtnlg`` command: finds the verb, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import difflib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, NoReturn, TextIO

from mtnlg import __version__

if TYPE_CHECKING:
    from mtnlg.cli.parser import VerbParser

EXIT_OK, EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 130, 143

VERBS = {
    "demo": "train a small model on text that is already here, in a few minutes",
    "tokenizer": "train a tokenizer from text",
    "encode": "turn text into token files",
    "train": "train a model from a recipe",
    "tune": "go on training a model, on conversations",
    "evaluate": "measure a model: perplexity, bits per byte and per character",
    "generate": "continue a text with a model",
    "chat": "talk with a model in the terminal, or through a pipe",
    "serve": "answer over HTTP: OpenAI's API and a chat page",
    "import": "read other people's models into a folder that every verb takes",
    "export": "write a model in the files that other programs load",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments after ``mtnlg``; ``None`` takes the process's own.

    Returns:
        0, or 1 (something failed), 2 (wrong usage, config or input), 130 (Ctrl-C), 143 (SIGTERM).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with_termination_signal()
        return _dispatch(arguments)
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`mtnlg ... | head`): leave quietly, flushing nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_OK if stop.code is None else EXIT_ERROR
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        _complain(describe(error))
        return code


def verb_parser(verb: str) -> VerbParser:
    """The parser of one verb, without importing what the verb runs."""
    from mtnlg.cli.parser import make_parser

    module = _verb_module(verb)
    parser = make_parser(verb, VERBS[verb], module.EXAMPLE)
    module.add_arguments(parser)
    return parser


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error that a user can cause; ``None`` for a bug of ours."""
    from mtnlg.config.errors import CheckpointError, ConfigError, DataError, MtnlgError, NotYetError

    if isinstance(error, (ConfigError, DataError, NotYetError, FileNotFoundError, IsADirectoryError)):
        return EXIT_USAGE
    if isinstance(error, CheckpointError) and not isinstance(error.__cause__, OSError):
        return EXIT_USAGE  # what was named cannot be used; a disk that fails is not the user's doing
    if isinstance(error, (MtnlgError, OSError)):
        return EXIT_ERROR
    return None


def describe(error: BaseException) -> str:
    """The message for the user: all problems of a config as a list, anything else as it is."""
    problems = getattr(error, "problems", None)
    if problems and len(problems) > 1:
        return "\n".join([f"{len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__


def with_termination_signal() -> None:
    """Let SIGTERM unwind the stack like Ctrl-C does, so that files are closed and children end."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
    except ValueError:
        return  # not the main thread: whoever embeds us owns the signals


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    _complain("stopped by SIGTERM")
    raise SystemExit(EXIT_TERMINATED)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_OK if arguments else EXIT_USAGE
    if arguments[0] in ("--version", "-V"):
        print(f"mtnlg {__version__}")
        return EXIT_OK
    verb = arguments[0]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(VERBS)}."
        _complain(f"there is no verb {verb!r}: {hint}")
        return EXIT_USAGE
    module, parser = _verb_module(verb), verb_parser(verb)
    parse = getattr(module, "parse", None)
    parsed = parse(parser, arguments[1:]) if parse else parser.read(arguments[1:])
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return module.run(parsed) or EXIT_OK


def overview() -> str:
    """The text of ``mtnlg --help``."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: mtnlg VERB [options]",
            "",
            "From raw text to a model that writes, on a laptop or on many machines.",
            "",
            "verbs:",
            *lines,
            "",
            "`mtnlg VERB --help` explains one verb, with an example. Start with: mtnlg demo",
            "options: --help, --version",
        ]
    )


def _verb_module(verb: str) -> ModuleType:
    return import_module(f"mtnlg.cli.{verb}")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings in one line; those of libraries as Python shows them."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        text = f"warning: {message}"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(text, file=file or sys.stderr, flush=True)


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
