"""The layout of Megatron's ``.idx`` files (little-endian, nothing aligned; see ``docs/formats.md``)."""

from __future__ import annotations

import struct

import numpy as np

from mtnlg.config.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
# magic, uint64 version, uint8 dtype code, uint64 sequences, uint64 document bounds
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
UINT16_VOCAB_LIMIT = 65_500  # vocabularies from here on are stored as int32, as Megatron does
LONGEST_SEQUENCE = 2**31 - 1


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The type that Megatron stores ids of such a vocabulary in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCAB_LIMIT else np.int32)


def index_size(num_sequences: int, num_bounds: int) -> int:
    """Bytes of an ``.idx`` file without multimodal modes."""
    return HEADER.size + 12 * num_sequences + 8 * num_bounds


def pack_header(dtype: np.dtype[np.generic], num_sequences: int, num_bounds: int) -> bytes:
    """The first 34 bytes of an ``.idx`` file."""
    return HEADER.pack(MAGIC, VERSION, CODES[np.dtype(dtype)], num_sequences, num_bounds)


def unpack_header(raw: bytes, where: str) -> tuple[np.dtype[np.generic], int, int]:
    """Read the header: dtype, number of sequences, number of document bounds.

    Raises:
        DataError: cut short, not this format, an unknown version or type of tokens.
    """
    if len(raw) < HEADER.size:
        raise DataError(f"{where} is cut short: {len(raw)} bytes, the header alone has {HEADER.size}.")
    magic, version, code, num_sequences, num_bounds = HEADER.unpack(raw[: HEADER.size])
    if magic != MAGIC:
        raise DataError(f"{where} is no token index: it does not begin with {MAGIC!r} but {magic!r}.")
    if version != VERSION:
        raise DataError(f"{where} has version {version} of the format; only version {VERSION} is known.")
    if code not in DTYPES:
        raise DataError(f"{where} says its tokens have type code {code}; known are 1 to 8.")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind not in "iu":
        raise DataError(f"{where} holds {dtype} values, which are not token ids.")
    return dtype, num_sequences, num_bounds
