"""Attention of single tokens on a CPU, by a kernel of our own (``kernels/paged_attention.cpp``).

It computes what :func:`~mtnlg.generation.paged_attention.attend_pages` and ``attend_step`` describe. It is
compiled once for a machine, in seconds, before the first step: nothing is compiled while answers run.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtnlg.generation.native import NativeKernel

if TYPE_CHECKING:
    from mtnlg.generation.attention_kernel import KernelShape

PAGE_SIZE = 16  # tokens: the lanes of a vector
DTYPES = (torch.float32, torch.bfloat16)
IS_BF16 = 1

KERNEL = NativeKernel(
    "decoder.cpp", "mtnlg_attend", [*[ctypes.c_void_p] * 8, ctypes.c_void_p, ctypes.c_int64], []
)
_Sizes = ctypes.c_int64 * 8


class NativeAttention:
    """Both forms of attention for models of one shape.

    Args:
        shape: see :func:`have_native_attention`.
    """

    def __init__(self, shape: KernelShape) -> None:
        self._function = KERNEL.load()
        self._shape, self._flags = shape, IS_BF16 * (shape.dtype == torch.bfloat16)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
        """See :func:`~mtnlg.generation.paged_attention.attend_pages`."""
        query = query.contiguous()
        found = torch.empty_like(query)
        self._call(query, query[0].numel(), found, keys, values, pages, lengths, None, None)
        return found

    def step(
        self,
        projected: Tensor,
        keys: Tensor,
        values: Tensor,
        new_pages: Tensor,
        new_places: Tensor,
        pages: Tensor,
        lengths: Tensor,
    ) -> Tensor:
        """See :func:`~mtnlg.generation.paged_attention.attend_step`."""
        projected, num_tokens = projected.contiguous(), len(lengths)
        width = self._shape.heads * self._shape.queries * self._shape.head_size
        found = projected.new_empty(projected.shape[0], width)
        found[num_tokens:] = 0
        new_pages, new_places = new_pages.contiguous(), new_places.contiguous()
        row = projected.shape[1]
        self._call(projected, row, found, keys, values, pages, lengths, new_pages, new_places)
        return found

    def _call(
        self,
        parts: Tensor,
        row: int,
        found: Tensor,
        keys: Tensor,
        values: Tensor,
        pages: Tensor,
        lengths: Tensor,
        new_pages: Tensor | None,
        new_places: Tensor | None,
    ) -> None:
        shape, pages, lengths = self._shape, pages.contiguous(), lengths.contiguous()
        sizes = _Sizes(
            len(lengths),
            shape.heads,
            shape.queries,
            shape.head_size,
            values.shape[-1],
            pages.shape[1],
            row,
            torch.get_num_threads(),
        )
        self._function(
            parts.data_ptr(),
            found.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if new_pages is None else new_pages.data_ptr(),
            None if new_places is None else new_places.data_ptr(),
            pages.data_ptr(),
            lengths.data_ptr(),
            sizes,
            self._flags,
        )


def native_attention(shape: KernelShape) -> NativeAttention | None:
    """The kernel for ``shape``, compiled if this machine never did; ``None`` where it cannot be had."""
    if shape.device != "cpu" or shape.dtype not in DTYPES or shape.page_size != PAGE_SIZE:
        return None
    return None if KERNEL.load() is None else NativeAttention(shape)
