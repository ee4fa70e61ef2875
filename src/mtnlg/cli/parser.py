"""How every verb's arguments are parsed and its help is laid out."""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

import jsonargparse


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and of the example."""


class VerbParser(jsonargparse.ArgumentParser):
    """A parser whose errors say what is wrong in one line and suggest the nearest option."""

    def format_help(self, formatter: Any = None) -> str:
        """The help, without the lines that jsonargparse adds for whole sections."""
        for action in self._actions:
            if action.help == "Path to a configuration file.":
                action.help = argparse.SUPPRESS
        options = [action for action in self._actions if action.option_strings]
        if len(options) > 20:
            wanted = [
                str(action.metavar or action.dest) for action in self._actions if not action.option_strings
            ]
            self.usage = " ".join([self.prog, *wanted, "[--setting=value ...]"])
        return super().format_help(formatter)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print ``message`` with the usage and exit with code 2."""
        options = [text for action in self._actions for text in action.option_strings]
        for word in message.split():
            near = difflib.get_close_matches(word.split("=")[0], options, n=1, cutoff=0.7)
            if word.startswith("--") and word.split("=")[0] not in options and near:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}\ntry: {self.prog} --help\n")
        raise AssertionError("exit returned")


def make_parser(verb: str, summary: str, example: str, **options: Any) -> VerbParser:
    """A parser for ``mtnlg VERB``.

    Args:
        verb: its name.
        summary: one line on what it is for.
        example: command lines shown at the end of the help.
        options: passed on to the parser.
    """
    indented = "\n".join(f"  {line}" for line in example.strip().splitlines())
    return VerbParser(
        prog=f"mtnlg {verb}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{indented}",
        formatter_class=_HelpFormatter,
        exit_on_error=True,
        **options,
    )
