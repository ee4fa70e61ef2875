"""What the tests of context parallelism run on ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.parallel.workers import mesh_of
from torch import Tensor

from mtnlg.parallel import attention_blocks
from mtnlg.parallel.all_to_all_attention import AllToAllAttention
from mtnlg.parallel.context import part_of_sequence
from mtnlg.parallel.ring_attention import Ring, RingAttention
from mtnlg.tokens.batch import Batch


def plain_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None) -> Tensor:
    """softmax(Q Kᵀ / √d) V from its definition, causal and within documents."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (item.repeat_interleave(repeats, dim=1) for item in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    length = query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return F.softmax(scores.masked_fill(~seen[:, None], float("-inf")), dim=-1) @ value


def sequence_batch(
    length: int, heads: int, key_value_heads: int, spans_documents: bool, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Random queries, keys and values, an output gradient, and documents that end anywhere."""
    generator = torch.Generator().manual_seed(length + heads)
    counts = (heads, key_value_heads, key_value_heads, heads)
    made = [torch.randn(2, count, length, 8, generator=generator).to(dtype) for count in counts]
    documents = None
    if spans_documents:
        # Another number at every boundary, and numbers that come back: only equality counts.
        begins = torch.rand(2, length, generator=generator) < 4.0 / length
        documents = begins.long().cumsum(1) % 3
    return made[:3], made[3], documents


def part(tensor: Tensor, layout: dict[str, Any], dim: int = 2) -> Tensor:
    """This rank's part of a sequence, as batches are cut."""
    places = torch.arange(tensor.shape[dim])[None]
    mine = part_of_sequence(Batch(places, places), mesh_of(layout)).input_ids[0]
    return tensor.index_select(dim, mine)


def attention_function(layout: dict[str, Any]) -> RingAttention | AllToAllAttention:
    group = mesh_of(layout).axis("context").get_group()
    if layout.get("context_parallel_method") == "all_to_all":
        return AllToAllAttention(group)
    return RingAttention(Ring(group))


def context_layout(method: str) -> dict[str, Any]:
    return {
        "context_parallel_size": dist.get_world_size(),
        "context_parallel_method": method,
        "data_parallel_size": 1,
    }


def attention_errors(
    method: str, length: int, heads: int, key_value_heads: int, documents: bool, dtype: str, tile: int
) -> list[float]:
    """Largest errors of output and of the gradients by query, key and value, beside plain attention."""
    attention_blocks.TILE_QUERIES, attention_blocks.TILE_KEYS = tile, 2 * tile
    layout = context_layout(method)
    whole, gradient, numbers = sequence_batch(
        length, heads, key_value_heads, documents, getattr(torch, dtype)
    )
    exact = [tensor.to(torch.float64, copy=True).requires_grad_() for tensor in whole]
    expected = plain_attention(*exact, numbers)
    expected.backward(gradient.double())
    mine = [part(tensor, layout).requires_grad_() for tensor in whole]
    found = attention_function(layout)(*mine, numbers, 0.0)
    found.backward(part(gradient, layout))
    pairs = [(found.detach(), expected.detach())]
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip(mine, exact)]
    return [float((ours.double() - part(theirs, layout)).abs().max()) for ours, theirs in pairs]
