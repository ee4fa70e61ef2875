"""Quantization-aware training: products with rounded weights, gradients for those that are not.

Each step rounds the weights anew, as :func:`~mtnlg.quantization.numbers.quantize` will at the end; the
gradient passes the rounding as if it were not there (straight-through, Bengio et al. 2013, arXiv 1308.3432;
for quantization Jacob et al. 2017, arXiv 1712.05877). So the weights learn to stand where rounding costs
little.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization.linear import rounded_activations
from mtnlg.quantization.model import HEAD, config_of, linears_to_quantize
from mtnlg.quantization.numbers import dequantize, group_length, quantize

Product = Callable[..., Tensor]  # (inputs, weight, bias)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, config: QuantizeConfig) -> Tensor:
        said = dequantize(quantize(weight, config), group_length(config, weight.shape[1]))
        return said.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded_weight(weight: Tensor, config: QuantizeConfig) -> Tensor:
    """What the codes of ``weight`` [out, in] stand for, with the gradient of ``weight`` itself."""
    rounded: Tensor = _Rounded.apply(weight, config)
    return rounded


def round_in_training(model: nn.Module, config: QuantizeConfig, product: Product = F.linear) -> None:
    """Let a model's linear layers and its loss compute with rounded weights, from outside.

    Args:
        model: a decoder or a stage of it; its parameters keep their names and numbers.
        config: the numbers.
        product: of inputs, weight and bias.
    """
    for name, linear in linears_to_quantize(model):
        own = config_of(name, config)
        if own is None:
            continue
        # The forward of the instance is replaced instead of the module: names stay.
        linear.forward = partial(_linear, linear, own, product)  # type: ignore[method-assign]
        if name == HEAD:
            head: Any = model.get_submodule("head")
            head.loss_function = partial(_loss, head.loss_function, own)


def _linear(module: nn.Linear, config: QuantizeConfig, product: Product, inputs: Tensor) -> Tensor:
    if config.activations == "int8":
        inputs = rounded_activations(inputs)
    return product(inputs, rounded_weight(module.weight, config), module.bias)


def _loss(
    inner: Callable[..., Tensor], config: QuantizeConfig, hidden: Tensor, weight: Tensor, labels: Tensor
) -> Tensor:
    if config.activations == "int8":
        hidden = rounded_activations(hidden)
    return inner(hidden, rounded_weight(weight, config), labels)
