"""Finding the files that a user's paths, folders and patterns mean, and what each one is."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mtnlg.config.errors import DataError

_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_KNOWN = "*.txt, *.jsonl, *.json (each also .gz or .zst), *.parquet"


@dataclass(frozen=True)
class SourceFile:
    """One input file.

    Args:
        path: where it is.
        kind: ``"text"`` (one document, unless a separator is given), ``"lines"`` (JSON Lines),
            ``"json"`` (JSON Lines or one array) or ``"parquet"``.
        compression: ``""``, ``"gz"`` or ``"zst"``.
        size: bytes on disk.
    """

    path: str
    kind: str
    compression: str
    size: int


def find_files(sources: Sequence[str | os.PathLike[str]]) -> list[SourceFile]:
    """The files that ``sources`` mean, in a fixed order, each once.

    A folder gives the files of known kinds anywhere inside it; a pattern (``data/**/*.py``) and a path
    give any file, unknown endings being plain text. Empty files inside folders and patterns are left out.

    Raises:
        DataError: a source does not exist, matches nothing, or is an empty file.
    """
    if not sources:
        raise DataError("no source is given: name files, folders or patterns.")
    found: dict[str, SourceFile] = {}
    for source in sources:
        for file in _files_of(os.fspath(source)):
            found.setdefault(os.path.realpath(file.path), file)
    return list(found.values())


def _files_of(source: str) -> list[SourceFile]:
    if os.path.isfile(source):
        if not os.path.getsize(source):
            raise DataError(f"{source} is empty.")
        return [_describe(source)]
    if os.path.isdir(source):
        paths: Iterable[str] = _walk(source)
        nothing = f"the folder {source} holds no {_KNOWN}; name other files by a pattern such as *.md."
    elif glob.has_magic(source):
        paths = (path for path in glob.iglob(source, recursive=True) if os.path.isfile(path))
        nothing = f"the pattern {source} matches no file."
    else:
        raise DataError(f"{source} does not exist.")
    files = [_describe(path) for path in sorted(paths)]
    if not files:
        raise DataError(nothing)
    filled = [file for file in files if file.size]
    if not filled:
        raise DataError(f"all {len(files)} files of {source} are empty.")
    return filled


def _walk(folder: str) -> Iterable[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = os.path.join(parent, name)
            if not name.startswith(".") and _kind(path)[0] is not None and os.path.isfile(path):
                yield path


def _kind(path: str) -> tuple[str | None, str]:
    stem, ending = os.path.splitext(path.lower())
    compression = _COMPRESSIONS.get(ending, "")
    if compression:
        ending = os.path.splitext(stem)[1]
    return _KINDS.get(ending), compression


def _describe(path: str) -> SourceFile:
    kind, compression = _kind(path)
    return SourceFile(path, kind or "text", compression, os.path.getsize(path))
