"""8-bit products in the linear layers of the blocks, through torchao (``precision.fp8``).

Inputs, weights and output gradients are each scaled to the range of an 8-bit float by their largest
element as they are met, and the GPU's 8-bit matrix units multiply them (Micikevicius et al. 2022, arXiv
2209.05433). Weights, optimizer state, norms, attention, embedding, head and experts stay as they are:
so names, checkpoints and what replicas send are those of a run without.

What is replaced is the product that a linear layer calls, not the layer. torchao's own conversion makes
new modules, which would lose what tensor parallelism has put on the old ones. It must be done before a
block is compiled or handed to FSDP: both take a block's forward as it is.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtnlg.config import ConfigError, PrecisionConfig
from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.model.attention import Attention
from mtnlg.model.mlp import Mlp

SMALLEST_CAPABILITY = (8, 9)  # Ada and Hopper: the first with 8-bit matrix units
EMULATE = False  # torchao's arithmetic on any device, a thousand times slower: for tests


def check_float8(precision: PrecisionConfig, device_type: str) -> None:
    """Refuse ``precision.fp8`` where it cannot work.

    Args:
        precision: number formats asked for.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: naming what is missing.
    """
    if not precision.fp8 or EMULATE:
        return
    cure = "Set precision.fp8: false; precision.dtype: bf16 is the fastest without."
    if device_type != "cuda":
        raise ConfigError(f"precision.fp8 is true: the CPU has no 8-bit matrix units. {cure}")
    found = torch.cuda.get_device_capability()
    if found < SMALLEST_CAPABILITY:
        raise ConfigError(
            f"precision.fp8 is true: {torch.cuda.get_device_name()} has compute capability "
            f"{found[0]}.{found[1]}, and 8-bit products begin with "
            f"{SMALLEST_CAPABILITY[0]}.{SMALLEST_CAPABILITY[1]} (Ada, Hopper). {cure}"
        )
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(f"precision.fp8 is true: it needs torchao: pip install 'mtnlg[fp8]'. {cure}")


class Float8Product:
    """``F.linear`` of [..., in] by [out, in] in 8-bit floats, forward and backward."""

    def __init__(self) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        # Sizes of matrices are checked before; numbers of tokens may be any.
        config = Float8LinearConfig(emulate=EMULATE, pad_inner_dim=True)
        with torch.device("meta"):
            shell = nn.Sequential(nn.Linear(16, 16, bias=False))
        # torchao's layer, run with the weight of whoever calls.
        self._layer: Any = convert_to_float8_training(shell, config=config)[0]

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Inputs [..., in], weight [out, in], bias [out] → [..., out]"""
        output = torch.func.functional_call(self._layer, {"weight": weight}, (inputs,))
        return output if bias is None else output + bias.to(output.dtype)


def use_float8(decoder: MegatronLmDecoder, product: Float8Product) -> None:
    """Let the linear layers of the blocks of an undivided ``decoder`` call ``product``."""
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        for block in (layer.attention, layer.mlp):
            for linear in block.children() if isinstance(block, (Attention, Mlp)) else ():
                if isinstance(linear, nn.Linear):
                    # The forward of the instance is replaced instead of the module: names stay.
                    linear.forward = partial(_linear, linear, product)  # type: ignore[method-assign]


def _linear(module: nn.Linear, product: Float8Product, inputs: Tensor) -> Tensor:
    return product(inputs, module.weight, module.bias)
