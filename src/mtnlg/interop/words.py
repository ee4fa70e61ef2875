"""Codes in words of 32 bits, as the formats of quantized weights pack them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.quantization.numbers import pack_int4

_WORD = 32  # bits
# Which code of eight each part of a word of AWQ's holds, from the lowest bits on: 0, 2, 4, 6, 1, 3, 5, 7.
# So the codes 0 to 7 stand in these parts:
_AWQ_PARTS = [0, 4, 1, 5, 2, 6, 3, 7]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """[out, in] int8 → [out, in · bits / 32 rounded up] int32, the first code in the lowest bits."""
    filled = F.pad(codes, (0, -codes.shape[1] % (_WORD // bits)))
    unsigned = (filled.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = pack_int4(unsigned.view(torch.int8))
    return unsigned.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_words`, the first ``count`` codes of each row."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=-1).flatten(1)
    return (unsigned[:, :count].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def unpack_awq(words: Tensor, count: int) -> Tensor:
    """[rows, out / 8] int32 of AWQ's ``gemm`` → [rows, out] int8 of -8..7."""
    codes = unpack_words(words, 4, count)
    return codes.unflatten(1, (-1, 8))[:, :, _AWQ_PARTS].flatten(1)


def one_more(zeros: Tensor, bits: int) -> Tensor:
    """Zero points of which files keep one less, the least as the largest: int8 signed, likewise."""
    half = 2 ** (bits - 1)
    unsigned = (zeros.to(torch.int16) + half + 1) & (2 * half - 1)
    return (unsigned - half).to(torch.int8)
