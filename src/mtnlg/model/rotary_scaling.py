"""Rotary frequencies stretched for texts longer than those that a model first learned from.

Slow frequencies have never finished a turn within such a text: beyond it their angles are new to the
model. Each way below slows them down so that they stay within what was seen: all alike (linear, Chen et
al. 2023, arXiv 2306.15595), by a larger base that grows with the text (dynamic), by how many turns a
frequency makes (YaRN, Peng et al. 2023, arXiv 2309.00071; Llama 3, arXiv 2407.21783), or by factors
found by searching (LongRoPE, Ding et al. 2024, arXiv 2402.13753). Names are those of
``MegatronModelConfig.rotary_scaling``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig

Scaling = dict[str, Any]


def rotary_frequencies(config: MegatronModelConfig, position_ids: Tensor) -> tuple[Tensor, float]:
    """Radians by which each pair of dimensions turns from one position to the next.

    Args:
        config: gives ``rotary_base``, ``rotary_dim`` and ``rotary_scaling``.
        position_ids: [batch or 1, sequence]; a text is as long as its last position says.

    Returns:
        [pairs] or [batch, 1, 1, pairs], float32; and what cosines and sines are multiplied by.
    """
    base = config.rotary_base
    scaling = config.rotary_scaling
    if scaling is None:
        return plain_frequencies(base, config.rotary_dim, position_ids.device), 1.0
    lengths = position_ids.amax(dim=1)[:, None, None, None] + 1  # [batch or 1, 1, 1, 1]
    return SCALINGS[scaling["rope_type"]](config, scaling, lengths)


def plain_frequencies(base: float | Tensor, rotary_dim: int, device: torch.device) -> Tensor:
    """``1 / base^(2i / rotary_dim)`` for each pair ``i``, [..., pairs], float32."""
    pairs = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32)
    return 1.0 / base ** (pairs / rotary_dim)


def _plain(config: MegatronModelConfig, lengths: Tensor) -> Tensor:
    return plain_frequencies(config.rotary_base, config.rotary_dim, lengths.device)


def _linear(config: MegatronModelConfig, scaling: Scaling, lengths: Tensor) -> tuple[Tensor, float]:
    return _plain(config, lengths) / scaling["factor"], 1.0


def _dynamic(config: MegatronModelConfig, scaling: Scaling, lengths: Tensor) -> tuple[Tensor, float]:
    longest, factor, size = config.max_position_embeddings, scaling["factor"], config.rotary_dim
    stretch = factor * lengths.clamp_min(longest) / longest - (factor - 1)
    base = config.rotary_base * stretch ** (size / max(1, size - 2))
    return plain_frequencies(base, size, lengths.device), 1.0


def _llama3(config: MegatronModelConfig, scaling: Scaling, lengths: Tensor) -> tuple[Tensor, float]:
    plain = _plain(config, lengths)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / scaling["factor"] + kept * plain, 1.0


def _yarn(config: MegatronModelConfig, scaling: Scaling, lengths: Tensor) -> tuple[Tensor, float]:
    plain, size = _plain(config, lengths), config.rotary_dim
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]

    def pair_of(turns: float) -> float:
        """The pair, as a fraction of them all, that makes so many turns in the original text."""
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    first, last = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    pairs = torch.arange(size // 2, device=lengths.device, dtype=torch.float32)
    slowed = ((pairs - first) / (last - first if last != first else 0.001)).clamp(0.0, 1.0)
    return plain / factor * slowed + plain * (1 - slowed), _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: Scaling) -> float:
    """What makes up for the flatter attention over longer texts (YaRN, section 3.4)."""

    def temperature(weight: float) -> float:
        factor = scaling["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    weight, weight_of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if weight and weight_of_all:
        return temperature(weight) / temperature(weight_of_all)
    return temperature(1.0)


def _longrope(config: MegatronModelConfig, scaling: Scaling, lengths: Tensor) -> tuple[Tensor, float]:
    original = scaling["original_max_position_embeddings"]
    short, long = (
        torch.tensor(scaling[name], dtype=torch.float32, device=lengths.device)
        for name in ("short_factor", "long_factor")
    )
    shares = torch.arange(0, config.rotary_dim, 2, device=lengths.device, dtype=torch.float32)
    shares = shares / config.rotary_dim
    slowed = torch.where(lengths > original, long, short) * config.rotary_base**shares
    given = scaling.get("attention_factor")
    if given is not None:
        return 1.0 / slowed, float(given)
    factor = scaling.get("factor") or config.max_position_embeddings / original
    return 1.0 / slowed, 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


SCALINGS: dict[str, Callable[[MegatronModelConfig, Scaling, Tensor], tuple[Tensor, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
