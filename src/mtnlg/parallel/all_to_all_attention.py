"""All-to-all attention: each rank trades its part of the sequence for some heads of the whole sequence.

Two exchanges, before and after an attention that is any rank's own (Jacobs et al. 2023, "DeepSpeed
Ulysses", arXiv 2309.14509). What a rank sends shrinks with the number of ranks, where in ring attention
it does not; but there can be no more ranks than heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.parallel.ring_attention import Ring, RingAttention


class AllToAllAttention:
    """Takes the place of a layer's ``attention_function``.

    Args:
        group: the ranks that share each sequence; each holds one stretch of it, in their order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.attention = RingAttention(Ring())

    @torch.compiler.disable  # messages around a kernel: nothing here for a compiler to fuse
    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """softmax(Q Kᵀ / √d) V of this rank's queries over all keys before them, causal.

        Args:
            query: [batch, heads, sequence / ranks, head_dim]; the ranks must divide the heads.
            key: [batch, key_value_heads, sequence / ranks, head_dim]; where the ranks do not divide
                these, they are sent several times.
            value: likewise.
            documents: [batch, sequence], number of every token's document.
            dropout: share of the attention weights that is dropped.

        Returns:
            [batch, heads, sequence / ranks, head_dim]
        """
        repeats = key_value_repeats(key.shape[1], self.size)
        if repeats > 1:
            key, value = (item.repeat_interleave(repeats, dim=1) for item in (key, value))
        by_rank = [item.unflatten(1, (self.size, -1)) for item in (query, key, value)]
        counts = [item.shape[2] for item in by_rank]
        received = _Exchange.apply(torch.cat(by_rank, dim=2).transpose(0, 1), self.group)
        # [rank, batch, heads / ranks, sequence / ranks, head_dim] of the whole sequence
        whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3).split(counts, dim=1)
        output = self.attention(*whole, documents, dropout)
        parts = output.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)
        return _Exchange.apply(parts, self.group).transpose(0, 1).flatten(1, 2)


def key_value_repeats(key_value_heads: int, ranks: int) -> int:
    """How often each key/value head is sent so that every rank gets those of its queries."""
    return math.lcm(key_value_heads, ranks) // key_value_heads


class _Exchange(torch.autograd.Function):
    """Rank i's part j of [ranks, ...] becomes rank j's part i; its own inverse."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(gradients[0], ctx.group), None


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received
