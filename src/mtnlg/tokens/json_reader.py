"""JSON Lines (and JSON arrays) as documents, with the file, line and byte in every complaint."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from mtnlg.config.errors import DataError
from mtnlg.tokens.compressed import ByteStream, open_bytes
from mtnlg.tokens.documents import FileSlice, Fragment, ReadOptions
from mtnlg.tokens.text_reader import not_utf8

_SPACE = b" \t\r\n"


def read_json_lines(part: FileSlice, options: ReadOptions) -> Iterator[Fragment]:
    """The documents of a JSON Lines file, or of the lines that begin in a slice of it.

    A ``.json`` file whose first sign is ``[`` is one array of records.

    Raises:
        DataError: a line is not UTF-8, not JSON, or has no text under the key.
    """
    with open_bytes(part.file.path, part.file.compression) as stream:
        if part.start:
            yield from _lines(stream, part, options, _skip_to_line(stream, part.start))
            return
        first = stream.readline()
        start = first.removeprefix(codecs.BOM_UTF8)
        if part.file.kind == "json" and start.lstrip(_SPACE)[:1] == b"[":
            yield from _array(start + stream.read(), part.file.path, options)
            return
        yield from _lines(stream, part, options, 0, first)


def _skip_to_line(stream: ByteStream, start: int) -> int:
    """Go to the first line that begins at ``start`` or later; its offset."""
    stream.seek(start - 1)
    return start - 1 + len(stream.readline())


def _lines(
    stream: ByteStream, part: FileSlice, options: ReadOptions, offset: int, first: bytes | None = None
) -> Iterator[Fragment]:
    path, end, number, disk = part.file.path, part.end, 0, offset
    packed = bool(part.file.compression)
    line = stream.readline() if first is None else first
    while line and (end is None or offset < end):
        number += 1
        place = _Place(path, number, offset, unknown_lines=part.start > 0)
        body = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
        if body.strip(_SPACE):
            text, name = _parse(body, place, options)
            used = len(line)
            if packed:
                now = stream.disk_position()
                used, disk = now - disk, now
            yield Fragment(text, True, name, num_bytes=len(line), disk_bytes=used)
        offset += len(line)
        line = stream.readline()


class _Place:
    """Where a line stands; the line number of a slice is counted only when it is asked for."""

    def __init__(self, path: str, line: int, offset: int, unknown_lines: bool) -> None:
        self.path, self.offset = path, offset
        self._line, self._unknown = line, unknown_lines

    @property
    def line(self) -> int:
        """The line's number in the file, from 1."""
        if not self._unknown:
            return self._line
        count, left = 1, self.offset
        with open(self.path, "rb") as file:
            while left and (block := file.read(min(left, 1 << 20))):
                count += block.count(b"\n")
                left -= len(block)
        return count

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"


def _parse(raw: bytes, place: _Place, options: ReadOptions) -> tuple[str, str]:
    try:
        content = raw.decode("utf-8", options.encoding_errors)
    except UnicodeDecodeError as error:
        message = not_utf8(place.path, place.line, place.offset + error.start, raw[error.start :])
        raise DataError(message) from error
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        offset = place.offset + len(content[: error.pos].encode("utf-8", "replace"))
        near = content[max(error.pos - 20, 0) : error.pos + 20].strip()
        whole = place.path.endswith(".json") and place.offset == 0
        hint = " A .json file must hold one record a line, or one array of records." if whole else ""
        raise DataError(
            f"{place}, byte {offset}: broken JSON ({error.msg}) near {near!r}.{hint}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{place}, byte {place.offset}: the JSON is nested too deeply.") from error
    text, name = text_of_record(record, str(place) if not isinstance(record, dict) else place, options)
    if b"\\u" in raw:  # only an escape can make half of a surrogate pair
        text = _whole_characters(text, place, options.encoding_errors)
    return text, name


def text_of_record(record: Any, place: object, options: ReadOptions) -> tuple[str, str]:
    """The text and the id of one record.

    Args:
        record: a JSON value; must be an object.
        place: says where it stands, for errors.
        options: name the field.

    Raises:
        DataError: no such field, or it holds no text.
    """
    if not isinstance(record, dict):
        raise DataError(f"{place}: the record is {_kind_of(record)}, not an object with a text field.")
    key = options.text_key
    if key not in record:
        fields = ", ".join(list(record)[:10]) or "none"
        raise DataError(f"{place}: no field {key!r}; it has: {fields}. Choose one with --text-key.")
    text = record[key]
    if isinstance(text, list) and all(isinstance(item, str) for item in text):
        text = "\n".join(text)
    if not isinstance(text, str):
        raise DataError(f"{place}: the field {key!r} is {_kind_of(text)}, not text or a list of texts.")
    name = record.get("id")
    return text, "" if name is None else str(name)


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return kinds.get(type(value), "a number")


def _whole_characters(text: str, place: _Place, errors: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{place}, byte {place.offset}: the text has half of a surrogate pair at character "
                f"{error.start}; use --encoding-errors replace (or ignore) to go on without it."
            ) from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
    return text


def _array(raw: bytes, path: str, options: ReadOptions) -> Iterator[Fragment]:
    try:
        records = json.loads(raw.decode("utf-8", options.encoding_errors))
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise DataError(not_utf8(path, line, error.start, raw[error.start :])) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: broken JSON ({error.msg}).") from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply.") from error
    for number, record in enumerate(records, 1):
        text, name = text_of_record(record, f"{path}, record {number}", options)
        text = _whole_characters(text, _Place(path, 1, 0, False), options.encoding_errors)
        share = len(raw) // len(records)
        yield Fragment(text, True, name, num_bytes=share, disk_bytes=share)
