"""T5's relative positions: a learned number for each head and each bucket of distances.

Raffel et al. 2019 (arXiv 1910.10683), section 2.1: "each embedding is simply a scalar that is added to
the corresponding logit used for computing the attention weights". Attention of this kind does not
divide its products by the square root of the head's size: that factor is in the initialisation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig


def distance_buckets(distances: Tensor, num_buckets: int, max_distance: int, looks_ahead: bool) -> Tensor:
    """The bucket of each distance (position of the key minus position of the query).

    Half of the buckets (of a direction) hold one distance each; the others grow as its logarithm up to
    ``max_distance``, beyond which all share the last.

    Args:
        distances: integers of any shape.
        num_buckets: in all; where the future is seen each direction has half of them.
        max_distance: tokens.
        looks_ahead: whether keys after the query are told from those before it (an encoder), or count
            as distance 0 (a causal decoder, which does not see them).

    Returns:
        Integers of the same shape, from 0 to ``num_buckets - 1``.
    """
    first = torch.zeros_like(distances)
    if looks_ahead:
        num_buckets //= 2
        first = (distances > 0).to(distances.dtype) * num_buckets
        distances = distances.abs()
    else:
        distances = (-distances).clamp_min(0)
    num_exact = num_buckets // 2
    growth = torch.log(distances.float() / num_exact) / math.log(max_distance / num_exact)
    # log 0 is -inf, which is no integer; those distances have buckets of their own anyway.
    far = num_exact + (growth.clamp_min(0.0) * (num_buckets - num_exact)).to(distances.dtype)
    return first + torch.where(distances < num_exact, distances, far.clamp_max(num_buckets - 1))


class RelativePositions(nn.Module):
    """What each head adds to its products for each distance.

    Args:
        config: the architecture.
        looks_ahead: of an encoder (both directions) or of a decoder (the past).
    """

    def __init__(self, config: MegatronModelConfig, looks_ahead: bool) -> None:
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.looks_ahead = looks_ahead
        self.buckets = nn.Embedding(self.num_buckets, config.num_attention_heads)

    def forward(self, distances: Tensor) -> Tensor:
        """[batch or 1, queries, keys] → [batch or 1, heads, queries, keys]"""
        buckets = distance_buckets(distances, self.num_buckets, self.max_distance, self.looks_ahead)
        return self.buckets(buckets).permute(0, 3, 1, 2)


def distances_between(queries: int, keys: int, device: torch.device) -> Tensor:
    """[1, queries, keys]: how far each key lies after each query, the last of both being one token."""
    query = torch.arange(keys - queries, keys, device=device)
    return (torch.arange(keys, device=device) - query[:, None])[None]


def add_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """``bias`` where ``mask`` allows, else the lowest number.

    Args:
        bias: [batch or 1, heads, queries, keys].
        mask: [batch or 1, 1, queries or 1, keys], true where a query may see a key; ``None`` is everywhere.
    """
    return bias if mask is None else torch.where(mask, bias, torch.finfo(bias.dtype).min)


def unscaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q Kᵀ + mask) V for each head; without a mask every query sees every key.

    Args:
        query: [batch, heads, sequence, head_dim].
        key: [batch, key_value_heads, keys, head_dim].
        value: likewise.
        mask: [batch or 1, heads or 1, sequence or 1, keys]: what is added to the products, or true where a
            query may see a key.
        dropout: share of the attention weights that is dropped.

    Returns:
        [batch, heads, sequence, head_dim]
    """
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=1.0, enable_gqa=grouped
    )
