"""Matrix products on a CPU over weights in tiles that are read once (``kernels/matrix.h``).

Decoding a few sequences is reading weights. oneDNN reads its packed weights at two thirds of what memory
gives when there are few rows; this kernel reads them at nearly all of it, and is no slower with many rows,
where all is arithmetic. A row's numbers depend neither on the rows beside it nor on how many there are.
docs/generation-speed.md has the measurements.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.huge_pages import WEIGHTS
from mtnlg.generation.native import NativeKernel

TILE = 32  # outputs
DTYPES = (torch.bfloat16, torch.float32)
IS_BF16, IS_SUM = 1, 2  # what the kernel is told
ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4, "squared_relu": 5}

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
KERNEL = NativeKernel(
    "tiled_product.cpp",
    "mtnlg_tiled_product",
    [*[_POINTER] * 3, _INTEGER, *[_POINTER] * 2, *[_INTEGER] * 5],
    ["avx512f"],
)


def can_tile(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :class:`TiledLinear` works here. Compiles the kernel.

    Args:
        device: of the weights.
        dtype: of weights and rows.
    """
    return device.type == "cpu" and dtype in DTYPES and KERNEL.load() is not None


class TiledLinear:
    """A linear layer as the kernel reads it (:class:`~mtnlg.generation.linears.Linear`).

    Args:
        weight: [out, in], float32 or bf16.
        bias: [out].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.kernel: Any = KERNEL.load()
        self.outputs, inputs = weight.shape
        per_word = 4 // weight.itemsize  # inputs in four bytes
        self.words = -(-inputs // per_word)
        self.missing = self.words * per_word - inputs
        self.tiles = _in_tiles(weight, self.words, per_word)
        self.bias = None if bias is None else bias.float().contiguous()
        self.num_bytes = self.tiles.nbytes
        self._flags = IS_BF16 * (weight.dtype == torch.bfloat16)
        bias_place = None if self.bias is None else self.bias.data_ptr()
        self._matrix = (self.tiles.data_ptr(), bias_place, self.outputs, self.words)

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See the protocol; ``activation`` is a key of :data:`ACTIVATIONS`."""
        if self.missing:
            rows = F.pad(rows, (0, self.missing))
        rows = rows.contiguous()
        found = rows.new_empty(rows.shape[0], self.outputs)
        other = plus if times is None else times
        if other is not None:
            other = other.contiguous()
        self.kernel(
            rows.data_ptr(),
            found.data_ptr(),
            None if other is None else other.data_ptr(),
            rows.shape[0],
            *self._matrix,
            self._flags + IS_SUM * (plus is not None),
            ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
        return found


def _in_tiles(weight: Tensor, words: int, per_word: int) -> Tensor:
    """[out, in] → [tiles, words, 32] of four bytes each, zeros where there is nothing."""
    outputs, inputs = weight.shape
    if words * per_word > inputs:
        weight = F.pad(weight, (0, words * per_word - inputs))
    rows = weight.contiguous().view(torch.int32)
    whole, rest = divmod(outputs, TILE)
    tiles = WEIGHTS.empty((whole + bool(rest), words, TILE), torch.int32)
    tiles[:whole] = rows[: whole * TILE].view(whole, TILE, words).transpose(1, 2)
    if rest:
        tiles[whole] = F.pad(rows[whole * TILE :].t(), (0, TILE - rest))
    return tiles
