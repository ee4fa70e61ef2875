"""Attention of single new tokens over keys and values in pages, read where they lie.

Keys of a page are stored [head_dim, tokens] and values [head_dim / block, tokens, block]: each vector of
the processor then takes the keys of a page's 16 tokens, or 16 dimensions of one token's value, in one
load, and sums over the other dimension without ever adding up inside a vector. The formulas are plain
torch; ``torch.compile`` makes one loop of them that follows the page numbers. A token's sums run over its
own keys in their order, and pages behind its last add zeros: its numbers do not depend on its neighbours.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

VALUE_BLOCK = 16  # dimensions of a value that lie together


class PagePool:
    """Keys and values of one layer.

    Memory is taken by the operating system's page as tokens come, not all at once.

    Attributes:
        keys: [pages, heads, head_dim, page_size].
        values: [pages, heads, head_dim / block, page_size, block].

    Args:
        num_pages: pages.
        page_size: tokens of one.
        num_heads: of keys and values.
        head_size: dimensions of one.
        dtype: of the numbers.
        device: where.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size, self.block = page_size, math.gcd(head_size, VALUE_BLOCK)
        self.keys = zeros_as_used((num_pages, num_heads, head_size, page_size), dtype, device)
        blocks = head_size // self.block
        self.values = zeros_as_used((num_pages, num_heads, blocks, page_size, self.block), dtype, device)

    def write(self, keys: Tensor, values: Tensor, pages: Tensor, places: Tensor) -> None:
        """File new tokens.

        Args:
            keys: [tokens, heads, head_dim].
            values: likewise.
            pages: [tokens] numbers of their pages.
            places: [tokens] places in them.
        """
        self.keys[pages, :, :, places] = keys
        self.values[pages, :, :, places] = values.unflatten(-1, (-1, self.block))

    def read(self, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, length, head_dim] of one sequence with these ``pages``."""
        keys = self.keys[pages].permute(1, 0, 3, 2).flatten(1, 2)  # [heads, tokens, head_dim]
        values = self.values[pages].permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)
        return keys[:, :length], values[:, :length]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Let each target page hold what its source page holds."""
        self.keys[targets] = self.keys[sources]
        self.values[targets] = self.values[sources]


def attend_pages(query: Tensor, keys: Tensor, values: Tensor, pages: Tensor, lengths: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √d) V of each token over the first ``lengths`` tokens of its pages.

    Summed in float32. Written as products and sums, which the compiler turns into loops over the pages;
    run as it is, it is slow and takes memory.

    Args:
        query: [tokens, key_value_heads, queries of each, head_dim].
        keys: [pages of the pool, key_value_heads, head_dim, page_size].
        values: [pages of the pool, key_value_heads, head_dim / block, page_size, block].
        pages: [tokens, pages of the longest]; any number behind a token's own.
        lengths: [tokens], at least 1.

    Returns:
        [tokens, key_value_heads, queries of each, head_dim]
    """
    page_size = keys.shape[-1]
    places = torch.arange(pages.shape[1] * page_size, device=query.device).view(-1, page_size)
    # Heads come first: the loop that is shared between threads is the outermost.
    scaled = (
        query.float().permute(1, 0, 2, 3) * query.shape[-1] ** -0.5
    )  # [heads, tokens, queries, head_dim]
    held = keys[pages].permute(2, 0, 1, 3, 4)[
        :, :, :, None
    ]  # [heads, tokens, pages, 1, head_dim, page_size]
    scores = (scaled[:, :, None, :, :, None] * held.float()).sum(4)
    is_seen = places[None, None, :, None] < lengths[None, :, None, None, None]
    scores = torch.where(is_seen, scores, -math.inf)  # [heads, tokens, pages, queries, page_size]
    weights = (scores - scores.amax((2, 4), keepdim=True)).exp()
    total = weights.sum((2, 4))  # [heads, tokens, queries]
    weights = weights.permute(0, 1, 3, 2, 4)[:, :, :, None, :, :, None]
    # [heads, tokens, 1, blocks, pages, page_size, block]
    held = values[pages].permute(2, 0, 3, 1, 4, 5)[:, :, None]
    mixed = (weights * held.float()).sum((4, 5)).flatten(3)
    return (mixed / total[..., None]).permute(1, 0, 2, 3).to(query.dtype)


def attend_step(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    new_pages: Tensor,
    new_places: Tensor,
    pages: Tensor,
    lengths: Tensor,
) -> Tensor:
    """File the keys and values of single tokens and attend, all in one.

    Args:
        projected: [tokens and filling, (heads + 2 · key_value_heads) · head_dim]: queries, keys, values.
        keys: see :func:`attend_pages`.
        values: likewise.
        new_pages: [tokens] pages in which the new tokens are filed.
        new_places: [tokens] places in them.
        pages: see :func:`attend_pages`.
        lengths: likewise.

    Returns:
        [tokens and filling, heads · head_dim], the filling zero.
    """
    heads, size, num_tokens = keys.shape[1], keys.shape[2], pages.shape[0]
    parts = projected[:num_tokens].unflatten(1, (-1, size))  # [tokens, all heads, head_dim]
    keys[new_pages, :, :, new_places] = parts[:, -2 * heads : -heads]
    values[new_pages, :, :, new_places] = parts[:, -heads:].unflatten(2, (-1, values.shape[-1]))
    query = parts[:, : -2 * heads].unflatten(1, (heads, -1))
    found = attend_pages(query, keys, values, pages, lengths).flatten(1)
    return torch.cat([found, found.new_zeros(projected.shape[0] - num_tokens, found.shape[1])])


def zeros_as_used(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken by the operating system's page as they are used."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy asks the operating system for zeros and large pages, torch writes its zeros itself.
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
