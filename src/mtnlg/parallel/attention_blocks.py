"""One block of attention: some queries over some keys, with what is needed to put blocks together.

A block returns its output and the logarithm of its softmax's denominator (log-sum-exp). Two blocks of
the same queries over different keys are merged from these exactly (online softmax: Milakov and
Gimelshein 2018, arXiv 1805.02867), and the backward pass of a block needs only the merged pair, as in
FlashAttention (Dao et al. 2022, arXiv 2205.14135). Scores are computed in tiles, so that memory grows
with the sequence and not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_QUERIES, TILE_KEYS = 128, 1024  # on a CPU, whose caches hold the scores of a tile
GPU_TILE_QUERIES, GPU_TILE_KEYS = 1024, 4096  # large enough that starting kernels takes no time
_SEEDS = 2**62


@dataclass(frozen=True)
class Visibility:
    """Which keys of a block its queries see, and which of the weights are dropped.

    Args:
        causal: queries and keys are the same tokens, and none sees a later one. Otherwise all keys
            come before all queries.
        documents: numbers of the documents of the queries [batch, queries] and of the keys
            [batch, keys]; a token sees its own document only. ``None`` is one document.
        dropout: share of the weights that is dropped.
        seed: of the dropout; the backward pass draws the same again.
    """

    causal: bool = False
    documents: tuple[Tensor, Tensor] | None = None
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Tile:
    """A rectangle of scores, and how it is masked."""

    rows: slice
    keys: slice
    hidden: Tensor | None  # [batch or 1, queries, keys], true where nothing is seen
    kept: Tensor | None  # [batch * key_value_heads, group, queries, keys], factors of dropout


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Visibility) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ / √d) V over the keys of one block.

    Args:
        query: [batch, heads, queries, head_dim].
        key: [batch, key_value_heads, keys, head_dim].
        value: likewise.
        seen: what is masked and dropped.

    Returns:
        The output [batch, heads, queries, head_dim] and the log-sum-exp of the scores
        [batch, heads, queries], both float32 (float64 for float64). A query that sees no key has
        output 0 and log-sum-exp -∞.
    """
    if _uses_flash(query, seen):
        return _flash(query, key, value, seen.causal)
    batch, heads, count, _ = query.shape
    scaled = query / math.sqrt(query.shape[-1])
    grouped, keys, values = _grouped(scaled, key.shape[1]), key.flatten(0, 1), value.flatten(0, 1)
    # [batch * key_value_heads, group, queries, head_dim], [batch * key_value_heads, keys, head_dim]
    output = torch.zeros(grouped.shape, dtype=_sum_dtype(query), device=query.device)
    logsumexp = torch.full(grouped.shape[:3], -math.inf, dtype=output.dtype, device=query.device)
    for tile in _tiles(query, key, seen):
        scores = _scores(grouped, keys, tile)
        largest = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if tile.kept is not None:
            weights = weights * tile.kept
        products = torch.bmm(weights.flatten(1, 2).to(value.dtype), values[:, tile.keys])
        part = products.view(*scores.shape[:3], -1) / total.clamp(min=torch.finfo(total.dtype).tiny)
        part_sums = (total.log() + largest).squeeze(-1)
        merge(output[:, :, tile.rows], logsumexp[:, :, tile.rows], part, part_sums)
    return output.view(batch, heads, count, -1), logsumexp.view(batch, heads, count)


def merge(output: Tensor, logsumexp: Tensor, other: Tensor, other_logsumexp: Tensor) -> None:
    """Merge a block's output and log-sum-exp into those of the same queries over other keys, in place."""
    total = torch.logaddexp(logsumexp, other_logsumexp)
    base = total.masked_fill(total == -math.inf, 0.0)  # neither saw a key: both shares are 0
    output.mul_((logsumexp - base).exp_()[..., None])
    output.add_(other * (other_logsumexp - base).exp_()[..., None])
    logsumexp.copy_(total)


def attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    seen: Visibility,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the queries, keys and values of one block.

    Args:
        gradient: by the merged output [batch, heads, queries, head_dim].
        query: of the block, as :func:`attend` took it.
        key: likewise.
        value: likewise.
        output: merged over all keys that the queries see, in this block or another.
        logsumexp: likewise [batch, heads, queries].
        seen: as :func:`attend` took it.

    Returns:
        Three tensors in the shapes of query, key and value, float32 (float64 for float64).
    """
    if _uses_flash(query, seen):
        return _flash_backward(gradient, query, key, value, output, logsumexp, seen.causal)
    groups, scale = key.shape[1], 1.0 / math.sqrt(query.shape[-1])
    grouped, keys, values = _grouped(query * scale, groups), key.flatten(0, 1), value.flatten(0, 1)
    sums = logsumexp.masked_fill(logsumexp == -math.inf, 0.0)
    sums = _grouped(sums[..., None], groups)  # [batch * key_value_heads, group, queries, 1]
    means = _grouped((gradient.to(output.dtype) * output).sum(dim=-1, keepdim=True), groups)
    gradient = _grouped(gradient.to(query.dtype), groups)
    by_query = torch.zeros(grouped.shape, dtype=_sum_dtype(query), device=query.device)
    by_key, by_value = torch.zeros(2, *keys.shape, dtype=by_query.dtype, device=query.device)
    for tile in _tiles(query, key, seen):
        rows, columns = tile.rows, tile.keys
        weights = _scores(grouped, keys, tile).sub_(sums[:, :, rows]).exp_()
        arriving = gradient[:, :, rows].flatten(1, 2)
        by_weight = torch.bmm(arriving, values[:, columns].transpose(1, 2)).view(weights.shape)
        dropped = weights
        if tile.kept is not None:
            dropped, by_weight = weights * tile.kept, by_weight * tile.kept
        by_value[:, columns] += torch.bmm(dropped.flatten(1, 2).to(query.dtype).transpose(1, 2), arriving)
        by_score = weights.mul_(by_weight.to(weights.dtype).sub_(means[:, :, rows]))
        by_score = by_score.flatten(1, 2).to(query.dtype)
        by_query[:, :, rows] += torch.bmm(by_score, keys[:, columns]).view(by_query[:, :, rows].shape)
        asking = grouped[:, :, rows].flatten(1, 2)
        by_key[:, columns] += torch.bmm(by_score.transpose(1, 2), asking)
    return by_query.mul_(scale).view(query.shape), by_key.view(key.shape), by_value.view(value.shape)


def _scores(query: Tensor, key: Tensor, tile: _Tile) -> Tensor:
    """Masked scores [batch * key_value_heads, group, queries, keys] of a tile."""
    rows = query[:, :, tile.rows]
    scores = torch.bmm(rows.flatten(1, 2), key[:, tile.keys].transpose(1, 2))
    scores = scores.to(_sum_dtype(query)).view(*rows.shape[:3], -1)
    if tile.hidden is not None:
        batch = tile.hidden.shape[0]
        by_sample = scores.view(batch, -1, *scores.shape[2:])  # heads of a sample share its mask
        by_sample.masked_fill_(tile.hidden[:, None], -math.inf)
    return scores


def _tiles(query: Tensor, key: Tensor, seen: Visibility) -> Iterator[_Tile]:
    """Every tile in which some query may see some key."""
    generator = None
    if seen.dropout > 0.0:
        generator = torch.Generator(query.device).manual_seed(seen.seed)
    height, width = TILE_QUERIES, TILE_KEYS
    if query.device.type != "cpu":
        height, width = GPU_TILE_QUERIES, GPU_TILE_KEYS
    for row in range(0, query.shape[2], height):
        rows = slice(row, min(row + height, query.shape[2]))
        end = rows.stop if seen.causal else key.shape[2]
        for column in range(0, end, width):
            keys = slice(column, min(column + width, end))
            hidden = _hidden(rows, keys, seen, query.device)
            if hidden is not None and query.device.type == "cpu":  # a GPU would have to be waited for
                if hidden.all():
                    continue
                hidden = hidden if hidden.any() else None
            yield _Tile(rows, keys, hidden, _kept(query, key, rows, keys, seen.dropout, generator))


def _hidden(rows: slice, keys: slice, seen: Visibility, device: torch.device) -> Tensor | None:
    """True where a query does not see a key: [batch or 1, queries, keys]; ``None`` where it sees all."""
    hidden = None
    if seen.causal and keys.stop > rows.start + 1:
        positions = torch.arange(keys.stop, device=device)
        hidden = (positions[rows, None] < positions[keys])[None]
    if seen.documents is not None:
        ours, theirs = seen.documents
        elsewhere = ours[:, rows, None] != theirs[:, None, keys]
        hidden = elsewhere if hidden is None else hidden | elsewhere
    return hidden


def _kept(
    query: Tensor, key: Tensor, rows: slice, keys: slice, dropout: float, generator: torch.Generator | None
) -> Tensor | None:
    """Factors of dropout: 0, or 1 / (1 - dropout)."""
    if generator is None:
        return None
    batch, heads = query.shape[:2]
    shape = (batch * key.shape[1], heads // key.shape[1], rows.stop - rows.start, keys.stop - keys.start)
    kept = torch.empty(shape, dtype=_sum_dtype(query), device=query.device)
    return kept.bernoulli_(1.0 - dropout, generator=generator).div_(1.0 - dropout)


def draw_seed(device: torch.device) -> int:
    """A seed of dropout, from torch's stream on ``device`` (which recomputation winds back)."""
    return int(torch.randint(_SEEDS, (), device=device))


def _grouped(heads: Tensor, groups: int) -> Tensor:
    """[batch, heads, queries, size] → [batch * groups, heads / groups, queries, size]"""
    return heads.unflatten(1, (groups, -1)).flatten(0, 1)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _uses_flash(query: Tensor, seen: Visibility) -> bool:
    """Whether torch's FlashAttention, which returns the log-sum-exp, covers the block."""
    if seen.documents is not None or seen.dropout > 0.0:
        return False
    if query.device.type == "cpu":
        return True
    is_16_bit, size = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return query.device.type == "cuda" and is_16_bit and size <= 256 and size % 8 == 0


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    repeats = query.shape[1] // key.shape[1]
    key, value = (item.repeat_interleave(repeats, dim=1) for item in (key, value))
    function = torch.ops.aten._scaled_dot_product_flash_attention
    if query.device.type == "cpu":
        function = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = function(query, key, value, 0.0, causal)[:2]
    return output.to(_sum_dtype(query)), logsumexp


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    groups, repeats = key.shape[1], query.shape[1] // key.shape[1]
    wide_key, wide_value = (item.repeat_interleave(repeats, dim=1) for item in (key, value))
    merged = output.to(query.dtype), logsumexp.contiguous()
    tensors = gradient.to(query.dtype), query, wide_key, wide_value, *merged
    if query.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        by_query, *rest = backward(*tensors, 0.0, causal)
    else:
        # No packed sequences, and no dropout whose random numbers would have to be drawn again.
        lengths, state = (None, None, query.shape[2], key.shape[2]), query.new_zeros(2, dtype=torch.uint64)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        by_query, *rest = backward(*tensors, *lengths, 0.0, causal, state, state.new_empty(()))
    dtype = _sum_dtype(query)
    by_key, by_value = (item.to(dtype).unflatten(1, (groups, repeats)).sum(2) for item in rest)
    return by_query.to(dtype), by_key, by_value
