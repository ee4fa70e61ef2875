"""Causal attention for training on CPUs, in blocks of queries, from batched matrix products.

torch's fused CPU kernel computes scores one small tile at a time; its backward pass reaches a quarter
of the rate of a batched product. Here a block of queries takes all keys that it may see at once: the
products are large, and half of the scores above the diagonal are never computed. As in
FlashAttention (Dao et al. 2022, arXiv 2205.14135) the weights of long sequences are computed again in
the backward pass instead of being kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mtnlg.model.attention import scaled_dot_product

BLOCK = 128  # queries at once
KEPT_BYTES = 2**27  # attention weights of one layer that may wait for its backward pass


@torch.compiler.disable  # its products are the work: compiled, its blocks only make the graph long
def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q Kᵀ / √d) V, causal; what this file does not cover goes to torch's kernel.

    Args:
        query: [batch, heads, sequence, head_dim].
        key: [batch, key_value_heads, keys, head_dim].
        value: likewise.
        mask: [batch, 1, sequence, keys], true where a query may see a key; ``None`` is causal.
        dropout: share of the attention weights that is dropped.

    Returns:
        [batch, heads, sequence, head_dim]
    """
    if mask is not None or dropout > 0.0 or query.shape[2] != key.shape[2] or not torch.is_grad_enabled():
        return scaled_dot_product(query, key, value, mask, dropout)
    if query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (item.repeat_interleave(repeats, dim=1) for item in (key, value))
    return _BlockwiseAttention.apply(query, key, value)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, sequence, size = query.shape
        ctx.scale = 1.0 / math.sqrt(size)
        scaled, key, value = (item.flatten(0, 1) for item in (query * ctx.scale, key, value))
        output = _like_projection(query)
        kept = []
        keeps = 0.5 * batch * heads * sequence**2 * query.element_size() <= KEPT_BYTES
        for start in range(0, sequence, BLOCK):
            end = min(start + BLOCK, sequence)
            weights = _weights(scaled, key, start, end)
            output[:, :, start:end] = torch.bmm(weights, value[:, :end]).unflatten(0, (batch, heads))
            if keeps:
                kept.append(weights)
        ctx.save_for_backward(scaled, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *kept = ctx.saved_tensors
        batch, heads, sequence, _ = output_gradients[0].shape
        gradient = output_gradients[0].flatten(0, 1)  # [batch * heads, sequence, head_dim]
        query_gradient = _like_projection(output_gradients[0])
        key_gradient, value_gradient = torch.zeros(2, *key.shape).unbind()
        for index, start in enumerate(range(0, sequence, BLOCK)):
            end = min(start + BLOCK, sequence)
            rows = slice(start, end)
            weights = kept[index] if kept else _weights(query, key, start, end)
            value_gradient[:, :end] += torch.bmm(weights.transpose(1, 2), gradient[:, rows])
            scores = torch.bmm(gradient[:, rows], value[:, :end].transpose(1, 2))
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            block = torch.bmm(scores, key[:, :end]).mul_(ctx.scale)
            query_gradient[:, :, rows] = block.unflatten(0, (batch, heads))
            key_gradient[:, :end] += torch.bmm(scores.transpose(1, 2), query[:, rows])
        rest = [_like_projection(query_gradient) for _ in range(2)]
        for target, source in zip(rest, (key_gradient, value_gradient)):
            target.copy_(source.unflatten(0, (batch, heads)))
        return query_gradient, *rest


def _weights(scaled: Tensor, key: Tensor, start: int, end: int) -> Tensor:
    """Attention weights of the queries [start, end) over the keys before ``end``."""
    scores = torch.bmm(scaled[:, start:end], key[:, :end].transpose(1, 2))
    future = torch.full((end - start, end - start), -math.inf, dtype=scores.dtype, device=scores.device)
    scores[:, :, start:] += future.triu(1)
    return scores.softmax(dim=-1)


def _like_projection(heads: Tensor) -> Tensor:
    """Empty [batch, heads, sequence, size] in the memory order of [batch, sequence, heads * size]."""
    batch, count, sequence, size = heads.shape
    return heads.new_empty(batch, sequence, count, size).transpose(1, 2)
