"""The header of a GGUF file (docs/gguf.md of ggml), versions 2 and 3: keys, and where each tensor lies."""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtnlg.config import CheckpointError, ConfigError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 8
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Args:
        path: the file.
        start: of its first byte.
        shape: outermost axis first.
        kind: how its numbers are stored, of ``gguf.GGMLQuantizationType``.
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    kind: Any


@dataclass(frozen=True)
class GgufHeader:
    """What a file, or all parts of one that is split, says before its numbers."""

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


def gguf_library() -> Any:
    """The package that knows the format.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError('GGUF needs the package gguf: pip install "mtnlg[interop]".') from None
    return gguf


def read_header(path: Path) -> GgufHeader:
    """The header of a file, or of all parts of one that is split; no numbers are read.

    Args:
        path: the file, or any part ``NAME-00001-of-00003.gguf`` beside the others.

    Raises:
        CheckpointError: it is no GGUF file, of another version, damaged or cut short, or a part is missing;
            what was found is said.
        ConfigError: ``gguf`` is not installed.
    """
    first = _read_one(path)
    count = first.fields.get("split.count", 0)
    if count <= 1:
        return first
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: it is one of {count} parts of a model, but not called "
            f"NAME-00001-of-{count:05d}.gguf: give all parts their names back."
        )
    names = [f"{match['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{path.parent}: parts of the model are missing: {', '.join(missing)}.")
    parts = [_read_one(path.parent / name) for name in names]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    expected = parts[0].fields.get("split.tensors.count", len(tensors))
    if len(tensors) != expected:
        raise CheckpointError(
            f"{path}: its {count} parts hold {len(tensors)} tensors, and should hold {expected}: "
            "they are of different models."
        )
    return GgufHeader(parts[0].fields, tensors)


def _read_one(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).read()
    except ValueError as error:  # mmap of an empty file
        raise CheckpointError(f"{path}: damaged or not a GGUF file ({error}).") from None
    except OSError as error:
        raise CheckpointError(f"{path}: the file cannot be read ({error}).") from error


class _Reader:
    """Goes through the bytes once.

    Args:
        path: named in errors.
        data: the whole file.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def read(self) -> GgufHeader:
        """Keys and tensors."""
        if self.data[:4] != MAGIC:
            raise CheckpointError(
                f"{self.path}: it begins with {self.data[:4]!r}, not with {MAGIC!r}: it is no GGUF file."
            )
        self.place = 4
        version = self.number("I")
        if version not in _VERSIONS:
            is_swapped = version in (value << 24 for value in _VERSIONS)
            found = "its bytes are in big-endian order" if is_swapped else f"its version is {version}"
            raise CheckpointError(f"{self.path}: {found}: only little-endian versions 2 and 3 can be read.")
        try:
            count, num_fields = self.number("Q"), self.number("Q")
            fields = {self.text(): self.value(self.number("I")) for _ in range(num_fields)}
            infos = [self.info() for _ in range(count)]
        except (struct.error, ValueError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{self.path}: the header is damaged or cut short at byte {self.place} of {len(self.data)} "
                f"({error}): fetch the file anew."
            ) from None
        return GgufHeader(fields, self.place_tensors(infos, fields.get("general.alignment", 32)))

    def number(self, code: str) -> Any:
        """The next number."""
        (found,) = struct.unpack_from(f"<{code}", self.data, self.place)
        self.place += struct.calcsize(f"<{code}")
        return found

    def bytes(self, size: int) -> bytes:
        """The next bytes."""
        if size > len(self.data) - self.place:
            raise ValueError(f"{size} bytes should follow")
        self.place += size
        return self.data[self.place - size : self.place]

    def text(self) -> str:
        """The next string; bytes that are no UTF-8 become U+FFFD."""
        return self.bytes(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """The next value: a number, a string, or a list of either."""
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value is of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            code = _NUMBERS[inner]
            return list(struct.unpack(f"<{count}{code}", self.bytes(count * struct.calcsize(f"<{code}"))))
        return [self.value(inner) for _ in range(count)]

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """The next tensor's name, shape (outermost axis first), kind and offset."""
        name, axes = self.text(), self.number("I")
        if axes > _MOST_AXES:
            raise ValueError(f"tensor {name!r} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def place_tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, StoredTensor]:
        """Where each tensor lies, all of them inside the file."""
        gguf = gguf_library()
        begin = -(-self.place // alignment) * alignment
        found = {}
        for name, shape, number, offset in infos:
            try:
                kind = gguf.GGMLQuantizationType(number)
                block, nbytes = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise CheckpointError(
                    f"{self.path}: tensor {name} is of the type {number}, which the installed gguf does "
                    'not know: pip install -U "gguf".'
                ) from None
            end = begin + offset + math.prod(shape) // block * nbytes
            if end > len(self.data):
                raise CheckpointError(
                    f"{self.path}: tensor {name} should end at byte {end}, but the file has "
                    f"{len(self.data)}: it is cut short; fetch it anew."
                )
            found[name] = StoredTensor(self.path, begin + offset, shape, kind)
        return found
