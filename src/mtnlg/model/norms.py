"""Normalization layers: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019)."""

from __future__ import annotations

from torch import nn

from mtnlg.config import MegatronModelConfig


def make_norm(config: MegatronModelConfig) -> nn.Module:
    """The normalization of ``config`` over the hidden size."""
    if config.normalization == "rmsnorm":
        return nn.RMSNorm(config.hidden_size, eps=config.layernorm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layernorm_eps)
