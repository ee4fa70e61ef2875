"""Keys and values in 8 bits: twice (bf16) to four times (float32) as many tokens in the same memory.

Each token's key and value of each head is rounded under a scale of its own when it is filed, and never
again, so that what is held does not depend on other tokens. It is made floating point where it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.generation.paged_attention import PagePool
from mtnlg.quantization.numbers import round_rows

SCALE_BYTES = 4  # of a token's key or value in one head


def int8_element_bytes(config: MegatronModelConfig) -> float:
    """Bytes of one number in the cache, its share of the scale included."""
    return 1 + SCALE_BYTES / config.head_size


class Int8Store:
    """Stands for a tensor of pages [pages, heads, ...]; what is taken out of it is floating point.

    Args:
        codes: int8 in the tensor's shape.
        scales: float32, broadcastable to it: one for each page, head and token.
        dtype: of what is taken out.
    """

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scales, self.dtype, self.shape = codes, scales, dtype, codes.shape

    def __getitem__(self, pages: Tensor) -> Tensor:
        return (self.codes[pages] * self.scales[pages]).to(self.dtype)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Let each target page hold what its source page holds."""
        self.codes[targets] = self.codes[sources]
        self.scales[targets] = self.scales[sources]


class Int8PagePool(PagePool):
    """Keys and values of one layer in 8 bits; see :class:`~mtnlg.generation.paged_attention.PagePool`."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(num_pages, page_size, num_heads, head_size, torch.int8, device)
        key_scales = torch.zeros(num_pages, num_heads, 1, page_size, device=device)
        value_scales = torch.zeros(num_pages, num_heads, 1, page_size, 1, device=device)
        self.keys = Int8Store(self.keys, key_scales, dtype)  # type: ignore[assignment]
        self.values = Int8Store(self.values, value_scales, dtype)  # type: ignore[assignment]

    def write(self, keys: Tensor, values: Tensor, pages: Tensor, places: Tensor) -> None:
        """See :class:`~mtnlg.generation.paged_attention.PagePool`."""
        codes, scales = round_rows(keys)
        self.keys.codes[pages, :, :, places] = codes  # type: ignore[attr-defined]
        self.keys.scales[pages, :, :, places] = scales  # type: ignore[attr-defined]
        codes, scales = round_rows(values)
        self.values.codes[pages, :, :, places] = codes.unflatten(-1, (-1, self.block))  # type: ignore[attr-defined]
        self.values.scales[pages, :, :, places] = scales[..., None]  # type: ignore[attr-defined]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """See :class:`~mtnlg.generation.paged_attention.PagePool`."""
        for store in (self.keys, self.values):
            store.copy(sources, targets)  # type: ignore[attr-defined]
