"""Writes tensors into safetensors files through ``torch.distributed.checkpoint``.

Each rank writes files of its own, straight from the tensors' memory, and their checksums as it goes:
no copy is made, and other threads run on meanwhile.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

FILE_BYTES = 2**30  # tensors of one file
BLOCK_BYTES = 2**24  # written at once

# What torch's reader looks for: where each tensor lies in the whole one.
_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorWriter(HuggingFaceStorageWriter):
    """torch's writer, splitting each rank's tensors into files of ``FILE_BYTES``.

    The split is by the plan of each rank: torch's own option is one mapping for all ranks, whose
    pipeline stages hold different tensors.

    Attributes:
        entries: size and SHA-256 of the files that this rank has written, by name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True)
        self.entries: dict[str, dict[str, Any]] = {}

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the ranks' files."""
        return [
            dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans, start=1)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files."""
        files = _in_files(plan.items)
        results = []
        for number, items in enumerate(files, start=1):
            name = f"shard-{plan.storage_data:05d}-model-{number:05d}-of-{len(files):05d}.safetensors"
            parts = [_Part(item, planner) for item in items]
            self.entries[name] = _write_file(Path(str(self.path)) / name, parts)
            results += [WriteResult(part.index, part.tensor.nbytes, name) for part in parts]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing: each file says by itself what it holds."""


class _Part:
    """A tensor to be written: the whole of it, or this rank's part."""

    def __init__(self, item: WriteItem, planner: SavePlanner) -> None:
        assert item.tensor_data is not None
        self.index = item.index
        self.offsets = list(item.tensor_data.chunk.offsets)
        self.tensor: Tensor = planner.resolve_data(item).detach().cpu().contiguous()  # type: ignore[union-attr]

    @property
    def bytes(self) -> memoryview:
        """Its memory."""
        return self.tensor.reshape(-1).view(torch.uint8).numpy().data


def _in_files(items: list[WriteItem]) -> list[list[WriteItem]]:
    files: dict[int, list[WriteItem]] = {}
    filled = 0
    for item in items:
        files.setdefault(filled // FILE_BYTES, []).append(item)
        filled += item.tensor_storage_size() or 0
    return list(files.values())


def _write_file(path: Path, parts: list[_Part]) -> dict[str, Any]:
    """Write one safetensors file, flushed to the disk; return its size and SHA-256."""
    checksum, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for block in (memoryview(_header(parts)), *(part.bytes for part in parts)):
            for start in range(0, len(block), BLOCK_BYTES):
                rest = block[start : start + BLOCK_BYTES]
                checksum.update(rest)
                size += len(rest)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
        os.fsync(file.fileno())
    return {"size": size, "sha256": checksum.hexdigest()}


def _header(parts: list[_Part]) -> bytes:
    places = {part.index.fqn: {_OFFSETS: part.offsets} for part in parts}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _PLACES: json.dumps(places)}}
    start = 0
    for part in parts:
        end = start + part.tensor.nbytes
        entries[part.index.fqn] = {
            "dtype": _DTYPES[part.tensor.dtype],
            "shape": list(part.tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
