"""Linear layers in float32 on CPUs through oneDNN.

torch hands float32 products to MKL, which on AMD's processors reaches 80 to 90% of what oneDNN does,
and half of it for a head of 50,000 columns. torch ships oneDNN and uses it for its other dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Asked once: the compiler cannot look into the question, and would break its graph at every layer.
IS_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of [..., in] by [out, in], with oneDNN's product wherever that is the faster one."""
    if inputs.dtype != torch.float32 or not IS_AVAILABLE:
        return F.linear(inputs, weight, bias)
    if torch.is_grad_enabled():
        return _OneDnnLinear.apply(inputs, weight, bias)
    return _product(inputs, weight, bias)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if torch.compiler.is_compiling():
        return _opaque_product(inputs, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


# The compiler takes oneDNN's operator for one of its own making; under another name it lets it be.
@torch.library.custom_op("mtnlg::onednn_product", mutates_args=(), device_types="cpu")
def _opaque_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


@_opaque_product.register_fake
def _(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _product(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        gradient = output_gradients[0]
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _product(gradient, weight.t()) if needs_inputs else None,
            rows.t() @ inputs.flatten(0, -2) if needs_weight else None,
            rows.sum(dim=0) if needs_bias else None,
        )
