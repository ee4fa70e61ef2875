"""Causal multi-head and grouped-query attention (Vaswani et al. 2017; Ainslie et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig
from mtnlg.model.attention_scores import scores_of_layer
from mtnlg.model.norms import make_head_norm
from mtnlg.model.positions import Rotation, rotate


class KeyValueCache(Protocol):
    """What attention asks of a cache while generating."""

    @property
    def length(self) -> int:
        """Tokens that the cache already holds for every layer."""

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append [batch, key_value_heads, new, head_dim]; return everything held, oldest first."""


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(Q Kᵀ / √d) V over the keys that ``mask`` allows, for each head.

    Args:
        query: [batch, heads, sequence, head_dim].
        key: [batch, key_value_heads, keys, head_dim].
        value: likewise.
        mask: [batch, 1, sequence, keys], true where a query may see a key; ``None`` is causal.
        dropout: share of the attention weights that is dropped.

    Returns:
        [batch, heads, sequence, head_dim]
    """
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[2] > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )


class Attention(nn.Module):
    """Projections of queries, keys and values, attention of each head, and the projection back.

    ``attention_function`` is an attribute so that a layout can put its own in.

    Args:
        config: the architecture.
        layer_index: number of the layer, under which a cache files its keys and values.
    """

    def __init__(self, config: MegatronModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.head_size = config.head_size
        self.attention_dropout = config.attention_dropout
        hidden, bias = config.hidden_size, config.attention_bias
        query_size = config.num_attention_heads * config.head_size
        key_value_size = config.key_value_heads * config.head_size
        self.query = nn.Linear(hidden, query_size, bias=bias)
        self.key = nn.Linear(hidden, key_value_size, bias=bias)
        self.value = nn.Linear(hidden, key_value_size, bias=bias)
        self.output = nn.Linear(query_size, hidden, bias=config.has_attention_output_bias)
        self.attention_function: Callable[..., Tensor] = (
            scores_of_layer(config, layer_index) or scaled_dot_product
        )
        # Scores are divided by √d; where another number is asked for, queries make up for it.
        scalar = config.attention_scalar or config.head_size
        self.query_scale = math.sqrt(config.head_size / scalar)
        self.query_norm = self.key_norm = None
        if config.qk_normalization:
            self.query_norm, self.key_norm = make_head_norm(config), make_head_norm(config)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden: [batch, sequence, hidden].
            rotation: rotary angles of the sequence; ``None`` leaves positions out.
            mask: [batch, 1, sequence, keys], true where a query may see a key; ``None`` is causal.
            cache: earlier keys and values, to which these are appended.

        Returns:
            [batch, sequence, hidden]
        """
        return self.output(self.attend(hidden, rotation, mask, cache))

    def attend(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """All but the last projection: [batch, sequence, hidden] → [batch, sequence, heads * head_dim]"""
        query = self._split_heads(self.query(hidden))
        key = self._split_heads(self.key(hidden))
        value = self._split_heads(self.value(hidden))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if self.query_scale != 1.0:
            query = query * self.query_scale
        if cache is not None:
            key, value = cache.update(self.layer_index, key, value)
        dropout = self.attention_dropout if self.training else 0.0
        context = self.attention_function(query, key, value, mask, dropout)
        # [batch, heads, sequence, head_dim]
        return context.transpose(1, 2).flatten(2)

    def _split_heads(self, projected: Tensor) -> Tensor:
        heads = projected.unflatten(-1, (-1, self.head_size))
        return heads.transpose(1, 2)  # [batch, heads, sequence, head_dim]
