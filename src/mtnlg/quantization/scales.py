"""Scales that are chosen for least error instead of covering the extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization.numbers import rounded, scales_and_zeros

# What of a group's range is tried; what lies outside is cut off.
SHARES = tuple(1.0 - 0.05 * step for step in range(9))


def best_scales(
    grouped: Tensor, importance: Tensor, config: QuantizeConfig
) -> tuple[Tensor, Tensor | None]:
    """For each group the scale (and zero) under which rounding costs least.

    Args:
        grouped: [out, groups, length] float32.
        importance: [groups, length] what a squared error of each input costs.
        config: the numbers.

    Returns:
        [out, groups] float32, and [out, groups] int8 or ``None``.
    """
    scales, zeros = scales_and_zeros(grouped, config)
    if config.weights == "float8":
        return scales, zeros
    least = torch.full_like(scales, torch.inf)
    found = scales.clone(), None if zeros is None else zeros.clone()
    for share in SHARES:
        tried, middle = scales_and_zeros(grouped * share, config)
        own = None if middle is None else middle[..., None]
        codes = rounded(grouped, tried[..., None], own, config).float()
        said = (codes if own is None else codes - own) * tried[..., None]
        costs = ((said - grouped).square() * importance).sum(-1)
        is_less = costs < least
        least = torch.where(is_less, costs, least)
        found[0][is_less] = tried[is_less]
        if found[1] is not None and middle is not None:
            found[1][is_less] = middle[is_less]
    return found
