"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split convention."""

from __future__ import annotations

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig

Rotation = tuple[Tensor, Tensor]


def rotation_angles(config: MegatronModelConfig, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosine and sine of every rotated pair of dimensions at every position.

    The angle of pair ``i`` at position ``p`` is ``p / base^(2i / rotary_dim)``, computed in float32.

    Args:
        config: gives ``rotary_base`` and ``rotary_dim``.
        position_ids: [batch or 1, sequence].
        dtype: of the result.

    Returns:
        Two tensors [batch or 1, 1, sequence, rotary_dim].
    """
    pairs = torch.arange(0, config.rotary_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequencies = config.rotary_base ** (-pairs / config.rotary_dim)
    angles = position_ids[:, None, :, None].float() * frequencies  # [batch, 1, sequence, pairs]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first ``rotary_dim`` dimensions of each head by its position's angles.

    Args:
        heads: queries or keys [batch, heads, sequence, head_dim].
        rotation: from :func:`rotation_angles`.
    """
    cosine, sine = rotation
    size = cosine.shape[-1]
    turned, kept = heads[..., :size], heads[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned
