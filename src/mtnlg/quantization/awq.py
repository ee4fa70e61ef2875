"""AWQ (Lin et al. 2023, arXiv 2306.00978): inputs that carry much are rounded finer.

The columns of a matrix are multiplied by s, and what makes its inputs is divided by s: nothing changes, but
a column with a large s loses less to rounding. s = (mean |x|)^α, and the α is taken under which the outputs
on the calibration text change least. What makes the inputs is a norm, the values, or the up projection of a
gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.model.norms import RMSNorm1p
from mtnlg.quantization.numbers import dequantize, group_length, quantize

EXPONENTS = tuple(step / 10 for step in range(11))
SAME = 1e-3  # relative change of a layer's output up to which it counts as rounding of floats
Maker = nn.LayerNorm | nn.RMSNorm | nn.Linear


@dataclass
class Scaling:
    """Matrices that read the same inputs, and the module that makes these.

    Args:
        maker: a norm, or a linear layer whose outputs reach them multiplied at most.
        readers: the matrices.
        inputs: [tokens, in] of the calibration text.
    """

    maker: Maker
    readers: Sequence[nn.Linear]
    inputs: Tensor


def scale_layer(scalings: Sequence[Scaling], config: QuantizeConfig, run: Callable[[], Tensor]) -> int:
    """Scale what can be scaled, in place; a scaling that would change the layer's outputs is taken back.

    Args:
        scalings: of one layer.
        config: the numbers.
        run: the layer's outputs on some of the calibration text.

    Returns:
        How many were applied.
    """
    applied = 0
    for scaling in scalings:
        before = run()
        factors = best_factors(scaling, config)
        saved = [p.detach().clone() for p in _touched(scaling)]
        fold(scaling, factors)
        change = (run() - before).norm() / before.norm()
        if float(change) < SAME:
            applied += 1
            continue
        for parameter, old in zip(_touched(scaling), saved):
            parameter.data.copy_(old)
    return applied


def best_factors(scaling: Scaling, config: QuantizeConfig) -> Tensor:
    """s [in] under which the readers' outputs change least when they are rounded."""
    inputs = scaling.inputs.float()
    size = inputs.abs().mean(0).clamp_min(1e-6)
    weight = torch.cat([reader.weight.detach().float() for reader in scaling.readers])
    expected = inputs @ weight.T
    least, best = float("inf"), torch.ones_like(size)
    for exponent in EXPONENTS:
        factors = size**exponent
        factors = factors / (factors.max() * factors.min()).sqrt()
        scaled = inputs / factors
        codes = quantize(weight * factors, config)
        error = (scaled @ dequantize(codes, group_length(config, weight.shape[1])).T - expected).square()
        if float(error.mean()) < least:
            least, best = float(error.mean()), factors
    return best


@torch.no_grad()
def fold(scaling: Scaling, factors: Tensor) -> None:
    """Multiply the readers' columns by ``factors`` [in] and divide what makes their inputs."""
    for reader in scaling.readers:
        reader.weight.mul_(factors.to(reader.weight.dtype))
    maker, divisor = scaling.maker, factors.to(scaling.maker.weight.dtype)
    if isinstance(maker, nn.Linear):
        maker.weight.div_(divisor[:, None])
    elif isinstance(maker, RMSNorm1p):
        maker.weight.copy_((1.0 + maker.weight) / divisor - 1.0)
    else:
        maker.weight.div_(divisor)
    bias = getattr(maker, "bias", None)
    if bias is not None:
        bias.div_(divisor)


def _touched(scaling: Scaling) -> list[nn.Parameter]:
    return [p for module in (*scaling.readers, scaling.maker) for p in module.parameters()]
