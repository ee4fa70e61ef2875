"""Small token files for the tests of the stream."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from mtnlg.config.data import BlendEntry, DataConfig


def write_tokens(prefix: Path, documents: list[np.ndarray]) -> str:
    """Write Megatron's pair by hand, so that these tests depend on no writer of ours."""
    lengths = np.array([len(document) for document in documents], dtype="<i4")
    offsets = (np.cumsum(lengths) - lengths).astype("<i8") * 2
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(documents), len(documents) + 1)
    bounds = np.arange(len(documents) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes() + offsets.tobytes() + bounds.tobytes())
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    return str(prefix)


def numbered_documents(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents in which every token of the file is a different number."""
    ends = first + np.cumsum(lengths)
    return [np.arange(end - length, end) for end, length in zip(ends, lengths)]


def data_config(*prefixes: str, weights: list[float] | None = None, **settings: object) -> DataConfig:
    """A blend of token files."""
    shares = weights or [1.0] * len(prefixes)
    blend = [BlendEntry(path, weight) for path, weight in zip(prefixes, shares)]
    return DataConfig(blend=blend, **settings)  # type: ignore[arg-type]
