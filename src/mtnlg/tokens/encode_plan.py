"""Dividing an encoding job into tasks, and telling whether a part on disk belongs to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from mtnlg.tokens.documents import FileSlice
from mtnlg.tokens.encode_task import EncodeSettings
from mtnlg.tokens.sources import SourceFile

_LARGEST_TASK = 64 << 20
_SMALLEST_TASK = 1 << 20
_USUAL_TASKS = 32
_FORMAT = 1  # raise it when the same input is to be encoded differently


@dataclass(frozen=True)
class Plan:
    """The tasks of a job, in the order of their parts in the result.

    Args:
        key: digest of everything that decides the result: files, tokenizer, settings.
        tasks: the slices that each task reads.
        num_bytes: of all files on disk.
    """

    key: str
    tasks: list[list[FileSlice]]
    num_bytes: int


def make_plan(files: Sequence[SourceFile], fingerprint: str, settings: EncodeSettings) -> Plan:
    """Divide ``files`` into tasks of similar size; large JSON Lines and Parquet files are cut.

    Args:
        files: in the order of the result.
        fingerprint: of the tokenizer.
        settings: of the job.
    """
    num_bytes = sum(file.size for file in files)
    size = min(max(num_bytes // _USUAL_TASKS, _SMALLEST_TASK), _LARGEST_TASK)
    tasks: list[list[FileSlice]] = [[]]
    filled = 0
    for file in files:
        for part, part_bytes in _slices(file, size):
            if tasks[-1] and filled + part_bytes > size:
                tasks.append([])
                filled = 0
            tasks[-1].append(part)
            filled += part_bytes
    return Plan(_key(files, fingerprint, settings), tasks, num_bytes)


def _slices(file: SourceFile, size: int) -> list[tuple[FileSlice, int]]:
    if file.size <= size:
        return [(FileSlice(file), file.size)]
    if file.kind == "parquet":
        from mtnlg.tokens.parquet_reader import row_group_sizes

        sizes = row_group_sizes(file.path)
        return [(FileSlice(file, i, i + 1), group) for i, group in enumerate(sizes)]
    if file.kind == "lines" and not file.compression:
        edges = [*range(0, file.size, size), file.size]
        return [(FileSlice(file, a, b), b - a) for a, b in pairwise(edges)]
    return [(FileSlice(file), file.size)]


def _key(files: Sequence[SourceFile], fingerprint: str, settings: EncodeSettings) -> str:
    # An engine does not change the ids, so changing it keeps finished parts.
    decides = {name: value for name, value in asdict(settings).items() if name != "engine"}
    inputs = [(os.path.abspath(file.path), file.size, os.stat(file.path).st_mtime_ns) for file in files]
    content = json.dumps([_FORMAT, fingerprint, decides, inputs], sort_keys=True)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
