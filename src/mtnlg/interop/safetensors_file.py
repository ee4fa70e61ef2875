"""What lies in a safetensors file: the header's length, the header in JSON, and the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from mtnlg.config import CheckpointError
from mtnlg.interop.lazy_tensor import FileBytes, LazyTensor, lazy

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit


def safetensors_in(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file by name, none of them read, and its notes.

    Raises:
        CheckpointError: the file is missing, damaged, cut short, or of numbers that torch has not.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > _MOST_HEADER_BYTES:
                raise CheckpointError(f"{path}: damaged or not a safetensors file.")
            header = json.loads(file.read(length).decode("utf-8"))
        metadata = dict(header.pop("__metadata__", {}))
        start = _LENGTH_BYTES + length
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size < end:
            raise CheckpointError(f"{path}: the file is cut short: {size} bytes of {end}.")
        return {name: _tensor(path, start, name, entry) for name, entry in header.items()}, metadata
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error!r}).") from None


def _tensor(path: Path, start: int, name: str, entry: dict[str, Any]) -> LazyTensor:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} is of {entry['dtype']}, which cannot be read.")
    first, last = entry["data_offsets"]
    sizes = [int(size) for size in entry["shape"]]
    if first < 0 or min(sizes, default=0) < 0 or last - first != math.prod(sizes) * dtype.itemsize:
        raise CheckpointError(f"{path}: damaged: tensor {name} has {last - first} bytes for its shape.")
    return lazy(FileBytes(path, start + first), sizes, dtype)
