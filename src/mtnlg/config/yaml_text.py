"""YAML with the line of every key, so that an error can name the place."""

from __future__ import annotations

import re
from typing import Any

import yaml

from mtnlg.config.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: ``1e-4`` is a number here, which PyYAML's YAML 1.1 reads as a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """The value of one override, read as YAML: ``"3"`` is a number, ``"[a, b]"`` a list.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"{text!r} cannot be read as a YAML value; put it into quotes.") from None


def parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Read a YAML mapping.

    Args:
        text: the file's text.
        name: the file's name, for messages.

    Returns:
        The values; the line (from 1) of every dotted key; one problem for each repeated key.

    Raises:
        ConfigError: the text is not YAML, or not a mapping.
    """
    lines: dict[str, int] = {}
    problems: list[str] = []
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return {}, lines, problems
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{name}: expected settings such as `seed: 1`, one on each line.")
        _collect_lines(root, "", name, lines, problems)
        return loader.construct_document(root), lines, problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {error.problem}.") from None
    except yaml.reader.ReaderError as error:
        where = f"{name}, line {text.count(chr(10), 0, error.position) + 1}"
        raise ConfigError(f"{where}: the character U+{error.character:04X} may not stand here.") from None
    except (ValueError, RecursionError) as error:  # a date that does not exist, an anchor inside itself
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: not valid YAML: {error}.") from None


def _collect_lines(
    node: yaml.Node, prefix: str, name: str, lines: dict[str, int], problems: list[str]
) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _collect_lines(item, f"{prefix}[{index}]", name, lines, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
        line = key.start_mark.line + 1
        if dotted in lines:
            problems.append(f"{name}, line {line}: {dotted} is given twice (also in line {lines[dotted]}).")
        lines[dotted] = line
        _collect_lines(value, dotted, name, lines, problems)
