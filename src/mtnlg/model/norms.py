"""Normalization layers: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig


class RMSNorm1p(nn.RMSNorm):
    """RMSNorm whose weights are kept less one, so that weight decay pulls them to one (Gemma)."""

    def reset_parameters(self) -> None:
        """Weights that change nothing."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] → [..., size]"""
        return rms_norm_1p(hidden, self.normalized_shape, self.weight, self.eps)


def rms_norm_1p(hidden: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None) -> Tensor:
    """``hidden / rms(hidden) · (1 + weight)``, in float32: one plus a small number needs its digits."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return F.rms_norm(hidden.to(exact), list(shape), 1.0 + weight.to(exact), eps).to(hidden.dtype)


def make_norm(config: MegatronModelConfig, size: int | None = None) -> nn.Module:
    """The normalization of ``config`` over the hidden size, or over ``size``."""
    kinds = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm, "rmsnorm_1p": RMSNorm1p}
    return kinds[config.normalization](size or config.hidden_size, eps=config.layernorm_eps)


def make_head_norm(config: MegatronModelConfig) -> nn.RMSNorm:
    """The RMSNorm over one head's queries or keys."""
    kind = RMSNorm1p if config.normalization == "rmsnorm_1p" else nn.RMSNorm
    return kind(config.head_size, eps=config.layernorm_eps)
