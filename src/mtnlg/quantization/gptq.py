"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): each rounding error is made good by the weights after it.

A row w of a matrix is rounded input by input; what input q loses, the inputs that are still to come take
over so that the outputs on the calibration text change least:
w_F -= (w_q - said_q) / [H_F⁻¹]_qq · (H_F⁻¹)_q with H = X Xᵀ of the layer's inputs. The inverses of all
steps are rows of one Cholesky factor. Inputs with the largest H_qq go first; scales are set before, so that
the order needs not be kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization.numbers import Codes, group_length, in_groups, rounded
from mtnlg.quantization.scales import best_scales

DAMPING = 0.01  # of the mean of H's diagonal, added to it
BLOCK = 128  # inputs whose effect on the rest is added up before it is applied


def quantize_gptq(weight: Tensor, second_moment: Tensor, config: QuantizeConfig) -> Codes:
    """Codes for a matrix, given what its inputs are like.

    Args:
        weight: [out, in].
        second_moment: [in, in] Σ x xᵀ over the calibration tokens.
        config: the numbers.
    """
    weight, moment = weight.float().clone(), second_moment.float().clone()
    is_silent = moment.diagonal() == 0  # never seen: rounded to the nearest
    moment.diagonal()[is_silent] = 1.0
    length = group_length(config, weight.shape[1])
    importance = in_groups(moment.diagonal()[None], length)[0]
    scales, zeros = best_scales(in_groups(weight, length), importance, config)
    each = torch.arange(weight.shape[1]) // length  # group of each input
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(moment[order][:, order])
    shown = Codes(
        weight[:, order], scales[:, each[order]], None if zeros is None else zeros[:, each[order]]
    )
    codes = torch.empty_like(weight, dtype=_code_dtype(config))
    codes[:, order] = _round_in_order(shown, factor, config)
    return Codes(codes, scales, zeros)


def _code_dtype(config: QuantizeConfig) -> torch.dtype:
    return torch.float8_e4m3fn if config.weights == "float8" else torch.int8


def _inverse_factor(moment: Tensor) -> Tensor:
    """Upper U with Uᵀ U = H⁻¹, more damped where H is nearly singular."""
    damping = DAMPING * float(moment.diagonal().mean())
    identity = torch.eye(len(moment))
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(moment + damping * identity)
        if not int(failed):
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        damping *= 10
    return identity


def _round_in_order(given: Codes, factor: Tensor, config: QuantizeConfig) -> Tensor:
    """Codes [out, in] of ``given.codes``, which holds the weights, input after input."""
    weight, codes = given.codes, torch.empty_like(given.codes, dtype=_code_dtype(config))
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.empty_like(weight[:, start:end])
        for place in range(start, end):
            zero = None if given.zeros is None else given.zeros[:, place]
            own = rounded(weight[:, place], given.scales[:, place], zero, config)
            said = (own.float() if zero is None else own.float() - zero) * given.scales[:, place]
            error = (weight[:, place] - said) / factor[place, place]
            weight[:, place:end] -= error[:, None] * factor[place, place:end]
            codes[:, place], errors[:, place - start] = own, error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return codes
