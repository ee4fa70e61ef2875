"""What the tests of context parallelism run on ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.parallel.workers import mesh_of
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.parallel import attention_blocks, lay_out, ring_attention
from mtnlg.parallel.all_to_all_attention import AllToAllAttention
from mtnlg.parallel.context import part_of_sequence
from mtnlg.parallel.ring_attention import Ring, RingAttention
from mtnlg.tokens.batch import Batch
from mtnlg.training.samples import gather_decoder


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


def dropped_attention(method: str, length: int, seeds: int, share: float) -> dict[str, Any]:
    """Attention with dropout: its mean over seeds, and what its gradient says beside differences."""
    attention_blocks.TILE_QUERIES, attention_blocks.TILE_KEYS = 4, 8
    layout = context_layout(method)
    whole, gradient, numbers = sequence_batch(length, 4, 2, True, torch.float64)
    function = attention_function(layout)
    mine = [part(tensor, layout) for tensor in whole]
    arriving = part(gradient, layout)

    def loss(*tensors: Tensor, seed: int = 0) -> Tensor:
        torch.manual_seed(1000 * seed + dist.get_rank())
        summed = (function(*tensors, numbers, share) * arriving).sum()
        everyone = summed.detach().clone()
        dist.all_reduce(everyone)
        return summed + (everyone - summed.detach())

    leaves = [tensor.clone().requires_grad_() for tensor in mine]
    loss(*leaves).backward()
    generator = torch.Generator().manual_seed(5 + dist.get_rank())
    steps = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in mine]
    change = torch.stack([(leaf.grad * step).sum() for leaf, step in zip(leaves, steps)]).sum()  # type: ignore[operator]
    dist.all_reduce(change)
    size = 1e-6
    ends = [loss(*(item + sign * size * step for item, step in zip(mine, steps))) for sign in (1, -1)]
    samples = []
    for seed in range(seeds):
        torch.manual_seed(1000 * seed + dist.get_rank())
        samples.append(function(*mine, numbers, share))
    expected = part(plain_attention(*whole, numbers), layout)
    return {
        "change": float(change),
        "difference": float(ends[0] - ends[1]) / (2 * size),
        "differs": float((samples[0] - expected).abs().max()),
        "mean_error": float((torch.stack(samples).mean(0) - expected).abs().max()),
    }


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """Bytes of every tensor that this rank sends to others over a sequence's group meanwhile."""
    sizes: list[int] = []
    batched, traded = dist.batch_isend_irecv, dist.all_to_all_single

    def batch_isend_irecv(operations: list[dist.P2POp]) -> Any:
        sizes.extend(item.tensor.nbytes for item in operations if item.op is dist.isend)
        return batched(operations)

    def all_to_all_single(received: Tensor, sent: Tensor, group: Any) -> Any:
        size = dist.get_world_size(group)
        sizes.append(sent.nbytes * (size - 1) // size)
        return traded(received, sent, group=group)

    dist.batch_isend_irecv, dist.all_to_all_single = batch_isend_irecv, all_to_all_single
    try:
        yield sizes
    finally:
        dist.batch_isend_irecv, dist.all_to_all_single = batched, traded


def attention_costs(method: str, length: int, heads: int, key_value_heads: int) -> dict[str, int]:
    """What one call of attention on 2 sequences really keeps and sends, float32, heads of 8."""
    layout = context_layout(method)
    whole, gradient, _ = sequence_batch(length, heads, key_value_heads, False, torch.float32)
    mine = [part(tensor, layout).requires_grad_() for tensor in whole]
    arriving = part(gradient, layout)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with counted_messages() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda item: item):
        found = attention_function(layout)(*mine)
    with counted_messages() as backward:
        found.backward(arriving)
    return {
        "kept_by_attention": sum(kept),
        "sent_forward": sum(forward),
        "sent_backward": sum(backward),
        "messages_forward": len(forward),
        "messages_backward": len(backward),
    }


def computed_pairs(length: int, spans_documents: bool) -> list[int]:
    """Pairs of queries and keys whose scores this rank computes in every step of the ring."""
    layout = context_layout("ring")
    whole, _, numbers = sequence_batch(length, 2, 2, spans_documents, torch.float32)
    pairs: list[int] = []
    original = ring_attention.attend

    def attend(query: Tensor, key: Tensor, value: Tensor, seen: attention_blocks.Visibility) -> Any:
        count = query.shape[2] * key.shape[2]
        pairs.append((count + query.shape[2]) // 2 if seen.causal else count)
        return original(query, key, value, seen)

    ring_attention.attend = attend
    try:
        attention_function(layout)(*(part(tensor, layout) for tensor in whole), numbers, 0.0)
    finally:
        ring_attention.attend = original
    return pairs


def parts_of(method: str, rows: int, length: int) -> dict[str, Any]:
    """What this rank gets of a batch whose tokens are their own places."""
    places = torch.arange(length).expand(rows, -1)
    documents = torch.arange(length).expand(rows, -1) // 3
    mine = part_of_sequence(Batch(places, places + 1, None, documents), mesh_of(context_layout(method)))
    assert mine.position_ids is not None and mine.document_ids is not None
    return {
        "input_ids": mine.input_ids.tolist(),
        "labels": mine.labels.tolist(),
        "position_ids": mine.position_ids.tolist(),
        "document_ids": mine.document_ids.tolist(),
    }


def dropout_of_hidden_states() -> float:
    """One random number of the stream that this rank's dropout draws from."""
    config = MegatronModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = lay_out(config, mesh_of(context_layout("ring")))
    model.seed_dropout(3, 1)
    return torch.rand(()).item()


def gathered_loss() -> float | None:
    """Loss of the whole plain model that writes samples; ``None`` on ranks that do not get it."""
    config = MegatronModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    layout = {"context_parallel_size": dist.get_world_size() if dist.is_initialized() else 1}
    model = lay_out(config, mesh_of({**layout, "data_parallel_size": 1}))
    decoder = model.decoder if model.is_whole else gather_decoder(model)
    if decoder is None:
        return None
    ids = torch.arange(16).view(2, 8) % 7
    return float(decoder(ids, ids).loss.detach())
