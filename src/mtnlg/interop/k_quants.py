"""Matrices in 2 to 6 bits as llama.cpp's "K" formats hold them: blocks of 256.

A block has 8 or 16 sub-blocks, whose scales are quantized, too. In Q2_K, Q4_K and Q5_K a number is
``d·s·code − m·t``, in Q3_K and Q6_K ``d·s·code``: ``s`` and ``t`` are small integers of the sub-block,
``d`` and ``m`` float16 of the block. Of many scales tried for each sub-block, each refined by least
squares, the one with the least squared error is taken; when the scales have been rounded, ``d`` and ``m``
are refined likewise and the codes are chosen anew. The bytes are those of ``ggml-common.h``; the package
``gguf`` reads them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
_AT_ONCE = 1024  # blocks, which bounds the memory beside the matrix
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class KQuant:
    """One format.

    Args:
        size: numbers of a sub-block.
        bits: of a code.
        scale_bits: of a sub-block's scale.
        has_minimum: whether something is subtracted; codes without it are signed.
        tries: how far from the obvious scale others are tried, in codes.
    """

    size: int
    bits: int
    scale_bits: int
    has_minimum: bool
    tries: tuple[float, float, int]


K_QUANTS = {
    "Q2_K": KQuant(16, 2, 4, True, (-0.6, 1.0, 17)),
    "Q3_K": KQuant(16, 3, 6, False, (-1.2, 1.0, 23)),
    "Q4_K": KQuant(32, 4, 6, True, (-1.6, 1.0, 27)),
    "Q5_K": KQuant(32, 5, 6, True, (-1.6, 1.0, 27)),
    "Q6_K": KQuant(16, 6, 8, False, (-1.2, 1.0, 23)),
}


def quantize_k(matrix: Tensor, name: str) -> Tensor:
    """The bytes of a matrix.

    Args:
        matrix: [..., columns], float32, columns a multiple of 256.
        name: the format, of :data:`K_QUANTS`.

    Returns:
        [..., bytes of a row], uint8.
    """
    kind = K_QUANTS[name]
    blocks = matrix.reshape(-1, BLOCK)
    quantize = _with_minimum if kind.has_minimum else _signed
    pack = _PACKERS[name]
    parts = [pack(*quantize(part, kind)) for part in blocks.split(_AT_ONCE)]
    return torch.cat(parts).reshape(*matrix.shape[:-1], -1)


def _with_minimum(blocks: Tensor, kind: KQuant) -> tuple[Tensor, ...]:
    """Codes [blocks, parts, size], scales and minima [blocks, parts], ``d`` and ``m`` [blocks, 1]."""
    parts = blocks.unflatten(1, (-1, kind.size))
    largest, levels = 2**kind.scale_bits - 1, 2**kind.bits - 1
    scale, minimum = _best_scale_and_minimum(parts, kind)
    d, m = (_half(found.amax(1, keepdim=True) / largest) for found in (scale, minimum))
    scales = (scale * _inverse(d)).round().clamp(0, largest)
    minima = (minimum * _inverse(m)).round().clamp(0, largest)
    best = _codes_with_minimum(parts, d * scales, m * minima, levels)
    error = _error(parts, best, d * scales, m * minima)
    for _ in range(2):
        new_d, new_m = _refined(parts, best * scales[..., None], minima[..., None].expand_as(parts))
        codes = _codes_with_minimum(parts, new_d * scales, new_m * minima, levels)
        new_error = _error(parts, codes, new_d * scales, new_m * minima)
        is_better = (new_error < error) & (new_d > 0) & (new_m >= 0)
        d, m = torch.where(is_better, new_d, d), torch.where(is_better, new_m, m)
        best = torch.where(is_better[..., None], codes, best)
        error = torch.where(is_better, new_error, error)
    return best.byte(), scales.byte(), minima.byte(), d, m


def _best_scale_and_minimum(parts: Tensor, kind: KQuant) -> tuple[Tensor, Tensor]:
    """Of each sub-block, [blocks, sub-blocks], both at least 0: what is multiplied by and subtracted."""
    levels, count = 2**kind.bits - 1, float(kind.size)
    lowest = parts.amin(-1).clamp_max(0)
    spread = parts.amax(-1) - lowest
    sum_x, sum_xx = parts.sum(-1), (parts * parts).sum(-1)
    best_scale, best_low = spread / levels, lowest
    best_error = torch.full_like(lowest, torch.inf)
    for step in torch.linspace(*kind.tries[:2], kind.tries[2]).tolist():
        inverse = (levels + step) * _inverse(spread)
        codes = ((parts - lowest[..., None]) * inverse[..., None]).round().clamp(0, levels)
        sum_l, sum_ll, sum_xl = codes.sum(-1), (codes * codes).sum(-1), (parts * codes).sum(-1)
        divisor = _inverse(count * sum_ll - sum_l * sum_l)
        scale = (count * sum_xl - sum_x * sum_l) * divisor
        low = (sum_ll * sum_x - sum_l * sum_xl) * divisor
        alone = low > 0
        low = low.clamp_max(0)
        scale = torch.where(alone, sum_xl * _inverse(sum_ll), scale)
        error = scale * (scale * sum_ll + 2 * low * sum_l - 2 * sum_xl) + low * (low * count - 2 * sum_x)
        is_better = (error + sum_xx < best_error) & (scale > 0)
        best_error = torch.where(is_better, error + sum_xx, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_low = torch.where(is_better, low, best_low)
    return best_scale, -best_low


def _codes_with_minimum(parts: Tensor, scale: Tensor, minimum: Tensor, levels: int) -> Tensor:
    return ((parts + minimum[..., None]) * _inverse(scale)[..., None]).round().clamp(0, levels)


def _error(parts: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """Squared, of each block, [blocks, 1]."""
    difference = codes * scale[..., None] - minimum[..., None] - parts
    return (difference * difference).flatten(1).sum(1, keepdim=True)


def _refined(parts: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """``d`` and ``m`` with the least squares of ``d·first − m·second − parts`` in each block."""
    x, a, b = (tensor.flatten(1).double() for tensor in (parts, first, second))
    aa, ab, bb, xa, xb = ((p * q).sum(1, keepdim=True) for p, q in ((a, a), (a, b), (b, b), (x, a), (x, b)))
    determinant = aa * bb - ab * ab
    is_one = determinant <= 1e-9 * aa * bb  # nothing to subtract: only d
    inverse = _inverse(determinant)
    d = torch.where(is_one, xa * _inverse(aa), (xa * bb - xb * ab) * inverse)
    m = torch.where(is_one, 0.0, (xa * ab - xb * aa) * inverse)
    return _half(d.float()), _half(m.float())


def _signed(blocks: Tensor, kind: KQuant) -> tuple[Tensor, ...]:
    """Codes [blocks, sub-blocks, size] and scales [blocks, sub-blocks] from 0 on, ``d`` [blocks, 1]."""
    parts = blocks.unflatten(1, (-1, kind.size))
    half, half_scale = 2 ** (kind.bits - 1), 2 ** (kind.scale_bits - 1)
    scale = _best_scale(parts, half, kind.tries)
    extreme = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = _half(extreme / -half_scale)
    scales = (scale * _inverse(d)).round().clamp(-half_scale, half_scale - 1)
    best = _signed_codes(parts, d * scales, half)
    zero = torch.zeros_like(scales)
    error = _error(parts, best, d * scales, zero)
    for _ in range(2):
        product = (best * scales[..., None]).flatten(1)
        fitted = (product * blocks).sum(1, keepdim=True) * _inverse(
            (product * product).sum(1, keepdim=True)
        )
        new_d = _half(fitted)
        codes = _signed_codes(parts, new_d * scales, half)
        new_error = _error(parts, codes, new_d * scales, zero)
        is_better = new_error < error
        d = torch.where(is_better, new_d, d)
        best = torch.where(is_better[..., None], codes, best)
        error = torch.where(is_better, new_error, error)
    return (best + half).byte(), (scales + half_scale).byte(), d


def _best_scale(parts: Tensor, half: int, tries: tuple[float, float, int]) -> Tensor:
    """Of each sub-block, [blocks, sub-blocks]; negative where the largest number is positive."""
    extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best_scale, best_gain = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for step in torch.linspace(*tries[:2], tries[2]).tolist():
        inverse = -(half + step) * _inverse(extreme)
        codes = (parts * inverse[..., None]).round().clamp(-half, half - 1)
        sum_ll, sum_xl = (codes * codes).sum(-1), (parts * codes).sum(-1)
        scale = sum_xl * _inverse(sum_ll)
        gain = scale * sum_xl  # what the squared error is less than that of zeros
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, scale, best_scale)
    return best_scale


def _signed_codes(parts: Tensor, scale: Tensor, half: int) -> Tensor:
    return (parts * _inverse(scale)[..., None]).round().clamp(-half, half - 1)


def _inverse(numbers: Tensor) -> Tensor:
    """``1 / numbers``, and 0 where that is no number."""
    return (1.0 / numbers).nan_to_num_(0.0, 0.0, 0.0)


def _half(numbers: Tensor) -> Tensor:
    """As float16 holds them."""
    return numbers.clamp(-_LARGEST_HALF, _LARGEST_HALF).half().float()


def _bytes(halves: Tensor) -> Tensor:
    return halves.half().view(torch.uint8)


def _join(codes: Tensor, shape: tuple[int, ...], bits: int) -> Tensor:
    """Codes that share a byte lie along the second axis of ``shape``; the first has the low bits."""
    apart = codes.reshape(-1, *shape).long()
    shifts = torch.arange(0, 8, bits)[: shape[1], None]
    return (apart << shifts).sum(2).byte().flatten(1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight of each in 12 bytes."""
    low = torch.cat(
        (scales[:, :4] | (scales[:, 4:] >> 4 << 6), minima[:, :4] | (minima[:, 4:] >> 4 << 6)), 1
    )
    return torch.cat((low, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)), 1)


def _pack_q2(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, m: Tensor) -> Tensor:
    return torch.cat((scales | (minima << 4), _join(codes, (2, 4, 32), 2), _bytes(d), _bytes(m)), 1)


def _pack_q3(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    high, low = _join(codes >> 2, (1, 8, 32), 1), _join(codes & 3, (2, 4, 32), 2)
    packed = (scales[:, :8] & 15) | ((scales[:, 8:] & 15) << 4)
    return torch.cat((high, low, packed, _join(scales >> 4, (1, 4, 4), 2), _bytes(d)), 1)


def _pack_q4(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, m: Tensor) -> Tensor:
    return torch.cat((_bytes(d), _bytes(m), _six_bits(scales, minima), _join(codes, (4, 2, 32), 4)), 1)


def _pack_q5(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, m: Tensor) -> Tensor:
    high, low = _join(codes >> 4, (1, 8, 32), 1), _join(codes & 15, (4, 2, 32), 4)
    return torch.cat((_bytes(d), _bytes(m), _six_bits(scales, minima), high, low), 1)


def _pack_q6(codes: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    low, high = _join(codes & 15, (2, 2, 64), 4), _join(codes >> 4, (2, 4, 32), 2)
    return torch.cat((low, high, scales ^ 128, _bytes(d)), 1)  # scales from 0 on become signed bytes


_PACKERS: dict[str, Callable[..., Tensor]] = {
    "Q2_K": _pack_q2,
    "Q3_K": _pack_q3,
    "Q4_K": _pack_q4,
    "Q5_K": _pack_q5,
    "Q6_K": _pack_q6,
}
