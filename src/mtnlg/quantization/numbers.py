"""From weights to few bits and back: codes, scales and zero points, group by group.

A weight is ``(code - zero) * scale``, where the inputs of a row are cut into groups that share scale and
zero. Integer codes are signed; two of four bits share a byte, the even input in its low half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config.quantize import QuantizeConfig

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0
SMALLEST_SCALE = 1e-12  # of a group that is all zeros


@dataclass
class Codes:
    """A matrix in few bits.

    Args:
        codes: [out, in] int8, or float8 for ``float8``.
        scales: [out, groups] float32.
        zeros: [out, groups] int8, or ``None`` where all are 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def group_length(config: QuantizeConfig, num_inputs: int) -> int:
    """Inputs that share a scale in a matrix with so many; the last group may have fewer."""
    length = config.inputs_per_scale
    return num_inputs if length == 0 else min(length, num_inputs)


def num_groups(config: QuantizeConfig, num_inputs: int) -> int:
    """Groups of each row."""
    return -(-num_inputs // group_length(config, num_inputs))


def in_groups(weight: Tensor, length: int) -> Tensor:
    """[out, in] → [out, groups, length], the last group filled up with zeros."""
    missing = -weight.shape[1] % length
    return F.pad(weight, (0, missing)).unflatten(1, (-1, length))


def scales_and_zeros(grouped: Tensor, config: QuantizeConfig) -> tuple[Tensor, Tensor | None]:
    """What each group is divided by and where its zero is, from its extremes.

    Args:
        grouped: [..., length] float32.
        config: the numbers.

    Returns:
        [...] float32 that bf16 can say too, and [...] int8 or ``None``.
    """
    if config.weights == "float8":
        return _scale(grouped.abs().amax(-1) / LARGEST_FLOAT8), None
    steps = 2**config.bits - 1
    if config.symmetric:
        return _scale(grouped.abs().amax(-1) * (2 / steps)), None
    low, high = grouped.amin(-1).clamp_max(0), grouped.amax(-1).clamp_min(0)
    scales = _scale((high - low) / steps)
    zeros = (-low / scales).round().clamp(0, steps) - 2 ** (config.bits - 1)
    return scales, zeros.to(torch.int8)


def _scale(values: Tensor) -> Tensor:
    """The next number that bf16 has, so that files and kernels may keep scales in 16 bits without loss."""
    bits = values.clamp_min(SMALLEST_SCALE).view(torch.int32)
    return ((bits + 0xFFFF) & -0x10000).view(torch.float32)


def rounded(values: Tensor, scales: Tensor, zeros: Tensor | None, config: QuantizeConfig) -> Tensor:
    """The nearest code of each value: int8, or float8.

    Args:
        values: float32, any shape.
        scales: broadcastable to it.
        zeros: likewise, or ``None``.
        config: the numbers.
    """
    if config.weights == "float8":
        return (values / scales).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8)
    half = 2 ** (config.bits - 1)
    codes = (values / scales).round()
    if zeros is not None:
        codes = codes + zeros
    return codes.clamp(-half, half - 1).to(torch.int8)


def quantize(weight: Tensor, config: QuantizeConfig) -> Codes:
    """Round to the nearest: the base that calibrated methods are compared with.

    Args:
        weight: [out, in], any floating dtype.
        config: the numbers.
    """
    length = group_length(config, weight.shape[1])
    grouped = in_groups(weight.float(), length)
    scales, zeros = scales_and_zeros(grouped, config)
    codes = rounded(grouped, scales[..., None], None if zeros is None else zeros[..., None], config)
    return Codes(codes.flatten(1)[:, : weight.shape[1]].contiguous(), scales, zeros)


def dequantize(codes: Codes, length: int) -> Tensor:
    """[out, in] float32 from codes whose groups have ``length`` inputs."""
    grouped = in_groups(codes.codes.float(), length)
    if codes.zeros is not None:
        grouped = grouped - codes.zeros[..., None]
    return (grouped * codes.scales[..., None].float()).flatten(1)[:, : codes.codes.shape[1]]


def in_order(columns: Tensor, order: Tensor | None) -> Tensor:
    """[out, in] whose column j belongs to the input ``order[j]``, in the order of the inputs."""
    if order is None:
        return columns
    return torch.empty_like(columns).index_copy_(1, order.long(), columns)


def pack_int4(codes: Tensor) -> Tensor:
    """[out, in] int8 of -8..7 → [out, in / 2 rounded up] uint8."""
    unsigned = F.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8) & 15
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)


def unpack_int4(packed: Tensor, num_inputs: int) -> Tensor:
    """The inverse of :func:`pack_int4`."""
    both = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)[:, :num_inputs]
    return ((both ^ 8).to(torch.int16) - 8).to(torch.int8)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Activations in 8 bits, each row under its own scale (nothing else in the batch is looked at).

    Args:
        rows: [..., in].

    Returns:
        codes [..., in] int8 in -127..127, and scales [..., 1] float32.
    """
    scales = (rows.abs().amax(-1, keepdim=True).float() / 127).clamp_min(SMALLEST_SCALE)
    return (rows.float() / scales).round().to(torch.int8), scales
