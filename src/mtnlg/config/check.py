"""Checks plain values against the typed configs: unknown keys, near misses, wrong types."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any

from mtnlg.config.errors import ConfigError
from mtnlg.config.yaml_text import parse_value


class OverrideText(str):
    """A value as typed on the command line; how it is read depends on its setting's type."""


def setting_names(config_class: type, prefix: str = "") -> list[str]:
    """The dotted names of all settings of a config class, sections first to last."""
    names = []
    for name, hint in field_types(config_class).items():
        section = section_class(hint)
        if section is not None:
            names += setting_names(section, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def field_types(config_class: type) -> dict[str, Any]:
    """The type of each field of a config class, in order."""
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def section_class(hint: Any) -> type | None:
    """The config class of a field that holds settings itself, or may (``Config | None``)."""
    found = [option for option in _alternatives(hint) if dataclasses.is_dataclass(option)]
    return typing.cast(type, found[0]) if found else None


def unknown_key(dotted: str, known: list[str]) -> str:
    """The message for a setting that does not exist, with what was probably meant."""
    last = dotted.rsplit(".", 1)[-1]
    moved = [name for name in known if name.rsplit(".", 1)[-1] == last]
    near = moved or difflib.get_close_matches(dotted, known, n=2, cutoff=0.75)
    if not near:
        ends = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [ends[end] for end in difflib.get_close_matches(last, ends, n=2, cutoff=0.75)]
    if not near:  # perhaps the section is misspelt
        sections = {name.split(".")[0] for name in known} - {dotted.split(".")[0]}
        near = difflib.get_close_matches(dotted, sections, n=1, cutoff=0.6)
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "see mtnlg train --help."
    return f"{dotted} is not a setting: {hint}"


class Checker:
    """Turns plain values into typed ones and remembers every problem.

    Args:
        known: the dotted names of all settings, for suggestions.
    """

    def __init__(self, known: list[str]) -> None:
        self.known = known
        self.problems: list[tuple[str, str]] = []  # (dotted name, message)

    def fields(self, config_class: type, values: Any, path: str) -> dict[str, Any]:
        """The fields of ``config_class`` in ``values`` that are right; the others become problems."""
        if isinstance(values, OverrideText):
            values = parse_value(values)
        if values is None:
            return {}
        if not isinstance(values, dict):
            self._problem(path, f"{path} is {values!r}: expected settings such as {path}.name: value.")
            return {}
        hints = field_types(config_class)
        right = {}
        for key, value in values.items():
            dotted = f"{path}.{key}" if path else str(key)
            if key not in hints:
                self._problem(dotted, unknown_key(dotted, self.known or list(hints)))
                continue
            is_right, typed = self._value(hints[key], value, dotted)
            if is_right:
                right[key] = typed
        return right

    def _value(self, hint: Any, value: Any, path: str) -> tuple[bool, Any]:
        item = _dataclass_of_list(hint)
        if item is not None:
            return self._entries(item, value, path)
        section = section_class(hint)
        if section is not None:
            return self._section(section, type(None) in _alternatives(hint), value, path)
        if isinstance(value, OverrideText):
            value = _read_override(hint, value)
        return self._scalar(hint, value, path)

    def _section(self, section: type, may_be_none: bool, value: Any, path: str) -> tuple[bool, Any]:
        """A section inside a section; its class does not know where it stands."""
        if isinstance(value, OverrideText):
            value = parse_value(value)
        if value is None and may_be_none:
            return True, None
        before = len(self.problems)
        right = self.fields(section, value, path)
        if len(self.problems) > before:
            return False, None
        try:
            return True, section(**right)
        except ConfigError as error:
            for problem in error.problems:
                self._problem(path, f"{path}.{problem}")
            return False, None

    def _entries(self, entry_class: type, value: Any, path: str) -> tuple[bool, Any]:
        """A list of entries; a plain text stands for an entry with that path."""
        if isinstance(value, OverrideText):
            value = parse_value(value)
        if isinstance(value, (str, dict)):
            value = [value]
        if not isinstance(value, list):
            self._problem(path, f"{path} is {value!r}: expected a list.")
            return False, None
        before = len(self.problems)
        entries = []
        for index, entry in enumerate(value):
            fields = {"path": entry} if isinstance(entry, str) else entry
            checker = Checker([])
            right = checker.fields(entry_class, fields, f"{path}[{index}]")
            self.problems += checker.problems
            if "path" in right:
                entries.append(entry_class(**right))
            elif not checker.problems:
                self._problem(path, f"{path}[{index}]: path is missing.")
        return len(self.problems) == before, entries

    def _scalar(self, hint: Any, value: Any, path: str) -> tuple[bool, Any]:
        accepted = _alternatives(hint)
        if type(value) in (bool, type(None)) and type(value) not in accepted:
            shown = "null" if value is None else str(value).lower()
            self._problem(path, f"{path} is {shown}: expected {_expected(hint)}.")
            return False, None
        if isinstance(value, float) and int in accepted and float not in accepted and value.is_integer():
            value = int(value)  # 1e9 tokens
        if isinstance(value, float) and not math.isfinite(value):
            self._problem(path, f"{path} is {value}: expected a finite number.")
            return False, None
        try:
            return True, _validated(hint, value)
        except (TypeError, ValueError):
            self._problem(path, f"{path} is {value!r}: expected {_expected(hint)}.")
            return False, None

    def _problem(self, path: str, message: str) -> None:
        self.problems.append((path, message))


def _validated(hint: Any, value: Any) -> Any:
    """``value`` as jsonargparse accepts it for ``hint``.

    Raises:
        ValueError: it does not fit.
    """
    import argparse

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value}, defaults=False).value
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None


def _read_override(hint: Any, text: OverrideText) -> Any:
    accepted = _alternatives(hint)
    if str in accepted:
        return None if text in ("null", "None") and type(None) in accepted else str(text)
    value = parse_value(text)
    is_list = any(typing.get_origin(option) is list for option in accepted)
    return [str(text)] if is_list and not isinstance(value, (list, type(None))) else value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _dataclass_of_list(hint: Any) -> type | None:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(arguments[0]):
        return typing.cast(type, arguments[0])
    return None


_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def _expected(hint: Any) -> str:
    return " or ".join(_NAMES.get(option, str(option)) for option in _alternatives(hint))
