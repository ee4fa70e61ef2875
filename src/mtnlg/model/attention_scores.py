"""Attention whose scores are more than Q Kᵀ / √d: windows, biases by distance, soft caps.

A window hides keys further back than so many tokens (Beltagy et al. 2020, arXiv 2004.05150; Mistral,
arXiv 2310.06825). ALiBi subtracts from each score a head's slope times the distance (Press et al. 2021,
arXiv 2108.12409). A soft cap squeezes scores to between ±c as ``c · tanh(score / c)`` (Gemma 2, arXiv
2408.00118).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config import MegatronModelConfig


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """The slope of each head: ``2^(-8 i / n)`` for n heads, a power of two.

    Of other numbers the next smaller power of two come first, and every second of twice as many follow.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8.0 * index / power) for index in range(1, power + 1)]
    between = [2.0 ** (-4.0 * index / power) for index in range(1, 2 * power + 1, 2)]
    return tuple(first + between[: num_heads - power])


@dataclass(frozen=True)
class ScoredAttention:
    """softmax(scores) V for each head, whose scores are capped, biased or cut off.

    Args:
        window: tokens that a query sees, its own included; ``None`` is all before it.
        slopes: ALiBi's, of each query head; ``None`` is no bias.
        softcap: c; ``None`` leaves the scores as they are.
    """

    window: int | None = None
    slopes: tuple[float, ...] | None = None
    softcap: float | None = None

    def of_heads(self, heads: slice) -> ScoredAttention:
        """The same for some of the heads."""
        return self if self.slopes is None else replace(self, slopes=self.slopes[heads])

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Attend.

        Args:
            query: [batch, heads, sequence, head_dim]; its last token is that of the last key.
            key: [batch, key_value_heads, keys, head_dim].
            value: likewise.
            mask: [batch, 1, sequence, keys], true where a query may see a key; ``None`` is causal.
            dropout: share of the attention weights that is dropped.

        Returns:
            [batch, heads, sequence, head_dim]
        """
        seen, bias = self.seen(query, key, mask), self.bias(query, key)
        if self.softcap is not None:
            return self._capped(query, key, value, seen, bias, dropout)
        if bias is not None:
            seen = bias if seen is None else bias.masked_fill(~seen, -math.inf)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            dropout_p=dropout,
            is_causal=seen is None and query.shape[2] > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def seen(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """[batch or 1, 1, sequence, keys], true where a query sees a key; ``None`` is causal."""
        distances = _distances(query, key)
        hides = self.window is not None and key.shape[2] > self.window
        is_single = query.shape[2] == 1
        needs_all = self.slopes is not None or self.softcap is not None  # they take no ``is_causal``
        if mask is None and (hides or (needs_all and not is_single)):
            mask = (distances >= 0)[None, None]
        if mask is None or self.window is None or not hides:
            return mask
        return mask & (distances < self.window)

    def bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """ALiBi's, [1, heads, sequence, keys]."""
        if self.slopes is None:
            return None
        slopes = torch.tensor(self.slopes, device=query.device, dtype=torch.float32)
        bias = slopes[:, None, None] * -_distances(query, key)
        return bias.to(query.dtype)[None]

    def _capped(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor | None,
        bias: Tensor | None,
        dropout: float,
    ) -> Tensor:
        assert self.softcap is not None
        groups = query.shape[1] // key.shape[1]
        key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if bias is not None:
            scores = scores + bias
        if seen is not None:
            scores = scores.masked_fill(~seen, -math.inf)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return F.dropout(weights, dropout) @ value


def _distances(query: Tensor, key: Tensor) -> Tensor:
    """[sequence, keys]: tokens from each key to each query; negative for keys behind it."""
    keys = torch.arange(key.shape[2], device=key.device)
    return keys[key.shape[2] - query.shape[2] :, None] - keys


def scores_of_layer(config: MegatronModelConfig, layer_index: int) -> ScoredAttention | None:
    """How layer ``layer_index`` changes its scores; ``None`` where it does not."""
    window, softcap = config.window_of_layer(layer_index), config.attention_softcap
    slopes = alibi_slopes(config.num_attention_heads) if config.position_embedding == "alibi" else None
    if window is None and softcap is None and slopes is None:
        return None
    return ScoredAttention(window, slopes, softcap)
