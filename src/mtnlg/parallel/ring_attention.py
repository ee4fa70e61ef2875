"""Ring attention: queries stay, keys and values go round the ranks that share a sequence.

While a rank attends to the keys that it has, it sends them on to the next and receives others (Liu et
al. 2023, arXiv 2310.01889). A causal sequence is dealt out so that all ranks have equal work at every
step (as striped attention does, Brandon et al. 2023, arXiv 2311.09431, here with two chunks a rank):
of 2n chunks, rank r holds the chunks r and 2n - 1 - r. Of any two ranks' chunks exactly half the pairs
are then visible, and they form one rectangle without a mask:

- keys of an earlier rank: all queries see their first chunk, none the second;
- keys of a later rank: only the second chunk of queries sees them, and sees all.

Only a rank's own keys need the causal mask. Blocks that causality hides are never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.parallel.attention_blocks import Visibility, attend, attend_backward, draw_seed, merge

EVERYTHING = slice(None)


class Arriving:
    """A tensor that is on its way from the previous rank; the one sent is kept until it has left."""

    def __init__(self, works: list[Any], sent: Tensor, received: Tensor) -> None:
        self._works, self._sent, self._received = works, sent, received

    def wait(self) -> Tensor:
        """The tensor, as soon as it is here."""
        for work in self._works:
            work.wait()
        return self._received


class Ring:
    """The ranks that share a sequence, each beside the next.

    Args:
        group: these ranks; ``None`` is this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def shift(self, tensor: Tensor) -> Arriving:
        """Send ``tensor`` to the next rank and receive the previous rank's, without waiting."""
        received = torch.empty_like(tensor)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        exchanges = [
            dist.P2POp(dist.isend, tensor, group=self.group, group_peer=after),
            dist.P2POp(dist.irecv, received, group=self.group, group_peer=before),
        ]
        return Arriving(dist.batch_isend_irecv(exchanges), tensor, received)

    def travel(self, key: Tensor, value: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every rank's keys and values with its number, this rank's first; the next are under way."""
        held = torch.stack((key, value))
        for step in range(self.size):
            arriving = self.shift(held) if step < self.size - 1 else None
            yield (self.rank - step) % self.size, held[0], held[1]
            if arriving is not None:
                held = arriving.wait()

    def meeting(self, source: int, length: int) -> tuple[slice, slice]:
        """Queries of this rank and keys of rank ``source`` of which all see all (or, own, causally)."""
        half = length // 2
        if source == self.rank:
            return EVERYTHING, EVERYTHING
        return (EVERYTHING, slice(0, half)) if source < self.rank else (slice(half, None), EVERYTHING)


def chunks_of_rank(rank: int, size: int) -> tuple[int, int]:
    """The two of ``2 * size`` chunks of a sequence that a rank holds."""
    return rank, 2 * size - 1 - rank


@dataclass(frozen=True)
class _Settings:
    """What one call of ring attention keeps besides tensors."""

    ring: Ring
    dropout: float
    seed: int

    def block(self, source: int, length: int, documents: Tensor | None) -> tuple[slice, slice, Visibility]:
        """Queries, keys and their masking when the keys of rank ``source`` are here."""
        ring = self.ring
        rows, keys = ring.meeting(source, length)
        numbers = None
        if documents is not None:
            ours, theirs = (_held(documents, rank, ring.size) for rank in (ring.rank, source))
            numbers = ours[:, rows], theirs[:, keys]
        return rows, keys, Visibility(source == ring.rank, numbers, self.dropout, self.seed + source)


class RingAttention:
    """Takes the place of a layer's ``attention_function``.

    Args:
        ring: the ranks that share each sequence.
    """

    def __init__(self, ring: Ring) -> None:
        self.ring = ring

    @torch.compiler.disable  # messages between blocks: nothing here for a compiler to fuse
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
            query: [batch, heads, sequence / ranks, head_dim], this rank's two chunks.
            key: [batch, key_value_heads, sequence / ranks, head_dim].
            value: likewise.
            documents: [batch, sequence], number of every token's document in the order of the whole
                sequence; a token sees its own document only.
            dropout: share of the attention weights that is dropped.

        Returns:
            [batch, heads, sequence / ranks, head_dim]
        """
        settings = _Settings(self.ring, dropout, draw_seed(query.device) if dropout > 0.0 else 0)
        return _RingAttention.apply(query, key, value, documents, settings)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, settings: _Settings
    ) -> Tensor:
        ring = settings.ring
        output = logsumexp = torch.empty(0)
        for source, their_key, their_value in ring.travel(key, value):
            rows, keys, seen = settings.block(source, query.shape[2], documents)
            found = attend(query[:, :, rows], their_key[:, :, keys], their_value[:, :, keys], seen)
            if source == ring.rank:
                output, logsumexp = found
            else:
                merge(output[:, :, rows], logsumexp[:, :, rows], *found)
        result = _like_projection(output, query.dtype)
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, documents, result, logsumexp)
        return result

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, documents, output, logsumexp = ctx.saved_tensors
        gradient, ring = output_gradients[0], ctx.settings.ring
        by_query = own = torch.empty(0)
        under_way: Arriving | None = None  # sums of the gradients of the keys that were here before
        for source, their_key, their_value in ring.travel(key, value):
            rows, keys, seen = ctx.settings.block(source, query.shape[2], documents)
            found = attend_backward(
                gradient[:, :, rows],
                query[:, :, rows],
                their_key[:, :, keys],
                their_value[:, :, keys],
                output[:, :, rows],
                logsumexp[:, :, rows],
                seen,
            )
            if source == ring.rank:
                by_query, own = found[0], torch.stack(found[1:])
                continue
            by_query[:, :, rows] += found[0]
            sums = under_way.wait() if under_way else torch.zeros_like(own)
            for total, part in zip(sums, found[1:]):
                total[:, :, keys] += part
            under_way = ring.shift(sums)
        if under_way is not None:  # the next rank's sums have gone to it, ours have come home
            own += under_way.wait()
        by_key, by_value = (item.to(key.dtype) for item in own)
        return _like_projection(by_query, query.dtype), by_key, by_value, None, None


def _held(documents: Tensor, rank: int, size: int) -> Tensor:
    """The part of [batch, sequence] that ``rank`` holds: [batch, sequence / size]."""
    chunks = documents.chunk(2 * size, dim=1)
    return torch.cat([chunks[number] for number in chunks_of_rank(rank, size)], dim=1)


def _like_projection(heads: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy [batch, heads, sequence, size] in the memory order of [batch, sequence, heads * size]."""
    batch, count, sequence, size = heads.shape
    copy = heads.new_empty(batch, sequence, count, size, dtype=dtype).transpose(1, 2)
    return copy.copy_(heads)
