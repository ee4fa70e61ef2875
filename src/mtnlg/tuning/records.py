"""JSON records of chat data, one by one, each with the file and the line it begins on."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mtnlg.config import DataError
from mtnlg.tokens.compressed import open_bytes
from mtnlg.tokens.sources import SourceFile, find_files

_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One JSON value of a file.

    Args:
        value: what it says.
        path: the file.
        line: where it begins, from 1.
    """

    value: Any
    path: str
    line: int

    @property
    def where(self) -> str:
        """How errors name it."""
        return f"{self.path}, line {self.line}"


def read_records(sources: Sequence[str]) -> Iterator[Record]:
    """The records of JSON Lines files, or of files that hold one array of them (each also .gz or .zst).

    Args:
        sources: files, folders or patterns.

    Raises:
        DataError: a file is missing, empty, of another kind, not UTF-8 or not JSON; names the line.
    """
    for file in find_files(sources):
        if file.kind not in ("lines", "json", "text"):
            raise DataError(f"{file.path}: chat data must be JSON Lines (.jsonl) or JSON (.json).")
        text = _text_of(file)
        if text.lstrip(_SPACE)[:1] == "[":
            yield from _array(text, file.path)
        else:
            yield from _lines(text, file.path)


def _text_of(file: SourceFile) -> str:
    with open_bytes(file.path, file.compression) as stream:
        raw = stream.read()
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise DataError(f"{file.path}, line {line}: not UTF-8 (byte {error.start}).") from error


def _lines(text: str, path: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(_SPACE):
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            whole = path.lower().endswith(".json") and number == 1
            hint = " A .json file must hold one record a line, or one array of records." if whole else ""
            raise DataError(f"{path}, line {number}: broken JSON ({error.msg}).{hint}") from error
        except RecursionError as error:
            raise DataError(f"{path}, line {number}: the JSON is nested too deeply.") from error
        yield Record(value, path, number)


def _array(text: str, path: str) -> Iterator[Record]:
    """The items of one array, decoded one after the other so that each has its line."""
    decoder = json.JSONDecoder()
    place, line = _skip(text, text.index("[") + 1), 1
    counted = 0
    while place < len(text) and text[place] != "]":
        line += text.count("\n", counted, place)
        counted = place
        try:
            value, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: broken JSON ({error.msg}).") from error
        except RecursionError as error:
            raise DataError(f"{path}, line {line}: the JSON is nested too deeply.") from error
        yield Record(value, path, line)
        place = _skip(text, end)
        if place < len(text) and text[place] == ",":
            place = _skip(text, place + 1)
        elif place < len(text) and text[place] != "]":
            break
    if text[place : place + 1] != "]" or _skip(text, place + 1) < len(text):
        line += text.count("\n", counted, place)
        raise DataError(f"{path}, line {line}: broken JSON (the array of records does not end well).")


def _skip(text: str, place: int) -> int:
    """The first place from ``place`` on that is no space."""
    while place < len(text) and text[place] in _SPACE:
        place += 1
    return place
