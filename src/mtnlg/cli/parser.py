"""How every verb's arguments are parsed and its help is laid out."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import jsonargparse
from jsonargparse import Namespace

TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "NoneType": "null",
}


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and of the example."""


class VerbParser(jsonargparse.ArgumentParser):
    """A parser whose errors say what is wrong in one line and suggest the nearest option."""

    def read(self, argv: Sequence[str]) -> Namespace:
        """Parse; options may be written with dashes or underscores."""
        spelled = {
            text.replace("_", "-"): text for action in self._actions for text in action.option_strings
        }
        words = list(argv)
        for index, word in enumerate(words):
            if word == "--":
                break
            name, equals, value = word.partition("=")
            known = spelled.get(name.replace("_", "-")) if name.startswith("--") else None
            words[index] = f"{known}{equals}{value}" if known else word
        return self.parse_args(words)

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
        """Print ``message`` and where to find help, and exit with code 2."""
        message = _plain(message)
        options = [text for action in self._actions for text in action.option_strings]
        for word in message.split():
            name = word.split("=")[0].rstrip(":,")
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
            if name.startswith("--") and name not in options and near:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}\ntry: {self.prog} --help\n")
        raise AssertionError("exit returned")


def _plain(message: str) -> str:
    """jsonargparse's report of a value of the wrong type in one sentence."""
    key = re.match(r'Parser key "(.+?)":', message)
    value = re.search(r"(?:Got|Given) value: (.*)$", message)
    if not key or not value:
        return message
    kinds = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
    expected = " or ".join(TYPE_NAMES.get(kind, kind) for kind in kinds) or "something else"
    return f"--{key[1].replace('_', '-')} is {value[1]!r}: expected {expected}"


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
