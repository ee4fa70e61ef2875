"""Attention of single new tokens over pages where scores are capped, biased or cut off by a window.

Plain torch over copies of the pages: what these layers do is said in :mod:`mtnlg.model.attention_scores`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtnlg.generation.paged_attention import PagePool
from mtnlg.model.attention_scores import ScoredAttention


def attend_scored(
    scores: ScoredAttention,
    is_invariant: bool,
    query: Tensor,
    pool: PagePool,
    pages: Tensor,
    lengths: Tensor,
) -> Tensor:
    """Each token over the first ``lengths`` tokens of its pages.

    Args:
        scores: what is done with them.
        is_invariant: each token by itself, so that its numbers do not depend on its neighbours.
        query: [tokens, key_value_heads, queries of each, head_dim].
        pool: pages of the layer.
        pages: [tokens, pages of the longest]; any number behind a token's own.
        lengths: [tokens], at least 1.

    Returns:
        [tokens, key_value_heads, queries of each, head_dim]
    """
    if not is_invariant:
        keys = pool.keys[pages].permute(0, 2, 1, 4, 3).flatten(2, 3)  # [tokens, heads, keys, head_dim]
        values = pool.values[pages].permute(0, 2, 1, 4, 3, 5).flatten(4, 5).flatten(2, 3)
        return _attend(scores, query, keys, values, lengths)
    done = []
    for token, table, length in zip(query, pages, lengths):
        keys, values = pool.read(table[: -(-int(length) // pool.page_size)], int(length))
        done.append(_attend(scores, token[None], keys[None], values[None], length[None]))
    return torch.cat(done)


def _attend(
    scores: ScoredAttention, query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> Tensor:
    """Keys and values [tokens, key_value_heads, keys, head_dim], in float32."""
    products = query.float() @ keys.float().transpose(2, 3) * query.shape[-1] ** -0.5
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    # [tokens, 1, 1, keys]: how far each key lies back; negative behind the last
    distances = (lengths[:, None] - 1 - torch.arange(keys.shape[2], device=keys.device))[:, None, None]
    if scores.slopes is not None:
        slopes = torch.tensor(scores.slopes, device=keys.device).view(query.shape[1], query.shape[2], 1)
        products = products - slopes * distances
    seen = distances >= 0
    if scores.window is not None:
        seen = seen & (distances < scores.window)
    weights = products.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return (weights @ values.float()).to(query.dtype)
