"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the half-split convention."""

from __future__ import annotations

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.model.rotary_scaling import plain_frequencies, rotary_frequencies

Rotation = tuple[Tensor, Tensor]


def rotation_angles(config: MegatronModelConfig, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosine and sine of every rotated pair of dimensions at every position.

    The angle of pair ``i`` at position ``p`` is ``p / base^(2i / rotary_dim)``, computed in float32;
    ``rotary_scaling`` may stretch it.

    Args:
        config: gives ``rotary_base``, ``rotary_dim`` and ``rotary_scaling``.
        position_ids: [batch or 1, sequence].
        dtype: of the result.

    Returns:
        Two tensors [batch or 1, 1, sequence, rotary_dim].
    """
    frequencies, factor = rotary_frequencies(config, position_ids)
    return _cosine_and_sine(position_ids, frequencies, factor, dtype)


def local_rotation_angles(
    config: MegatronModelConfig, position_ids: Tensor, dtype: torch.dtype
) -> Rotation | None:
    """Those of layers with a window, where they have a base of their own: see :func:`rotation_angles`."""
    if config.rotary_local_base is None:
        return None
    frequencies = plain_frequencies(config.rotary_local_base, config.rotary_dim, position_ids.device)
    return _cosine_and_sine(position_ids, frequencies, 1.0, dtype)


class Rotations:
    """The angles of each layer of a model at some positions.

    Attributes:
        everywhere: of layers that see everything; ``None`` without rotary positions.
        local: of layers with a window, where those have their own.

    Args:
        config: the architecture.
        position_ids: [batch or 1, sequence].
        dtype: of the angles.
    """

    def __init__(self, config: MegatronModelConfig, position_ids: Tensor, dtype: torch.dtype) -> None:
        self.config = config
        self.everywhere = self.local = None
        if config.position_embedding == "rotary":
            self.everywhere = rotation_angles(config, position_ids, dtype)
            self.local = local_rotation_angles(config, position_ids, dtype)

    def of_layer(self, index: int) -> Rotation | None:
        """Cosine and sine [batch or 1, 1, sequence, rotary_dim]; ``None`` without rotary positions."""
        if self.local is not None and self.config.window_of_layer(index) is not None:
            return self.local
        return self.everywhere


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


def _cosine_and_sine(
    position_ids: Tensor, frequencies: Tensor, factor: float, dtype: torch.dtype
) -> Rotation:
    angles = position_ids[:, None, :, None].float() * frequencies  # [batch, 1, sequence, pairs]
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
