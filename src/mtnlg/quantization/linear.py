"""A linear layer whose matrix is kept in few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization.numbers import (
    FLOAT8,
    Codes,
    dequantize,
    group_length,
    in_order,
    num_groups,
    pack_int4,
    quantize,
    round_rows,
    unpack_int4,
)


class QuantizedLinear(nn.Module):
    """``inputs · Wᵀ + b``, W in few bits: for inference, and below adapters that are trained.

    The codes are buffers and get no gradient; the inputs do. In state dicts: ``codes`` [out, in] int8, or
    two to a byte [out, in / 2] uint8 for int4, or float8's bytes as uint8; ``scales`` [out, groups]
    float32; ``zeros`` [out, groups] int8 where the config is not symmetric; ``order`` [in] int32 where the
    inputs of a group are no neighbours: the column of codes j belongs to the input ``order[j]`` (GPTQ's
    activation order, only in files of others).

    Args:
        in_features: inputs.
        out_features: outputs.
        config: the numbers.
        bias: the bias, which is taken over as it is.
        device: of the codes, which are empty at first.
        dtype: in which :attr:`weight` gives the matrix.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: QuantizeConfig,
        bias: nn.Parameter | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.group_length = group_length(config, in_features)
        width = -(-in_features // 2) if config.weights == "int4" else in_features
        dtype = torch.int8 if config.weights == "int8" else torch.uint8
        groups = num_groups(config, in_features)
        empty = torch.empty(out_features, width, dtype=dtype, device=device)
        self.register_buffer("codes", empty)
        self.register_buffer("scales", torch.empty(out_features, groups, device=device))
        zeros = (
            None if config.symmetric else torch.empty(out_features, groups, dtype=torch.int8, device=device)
        )
        self.register_buffer("zeros", zeros)
        self.register_buffer("order", None)
        self.register_parameter("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, config: QuantizeConfig) -> QuantizedLinear:
        """A linear layer's weights, rounded to the nearest; on meta, shapes alone."""
        weight = linear.weight.detach()
        made = cls(
            linear.in_features, linear.out_features, config, linear.bias, weight.device, weight.dtype
        )
        if not weight.is_meta:
            made.set_codes(quantize(weight, config))
        return made.train(linear.training)

    @property
    def num_groups(self) -> int:
        """Groups of each row."""
        return self.scales.shape[1]

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in] in :attr:`dtype`, made anew at each call."""
        return self.dequantize().to(self.dtype)

    @torch.no_grad()
    def set_codes(self, codes: Codes) -> None:
        """Take over codes as :func:`~mtnlg.quantization.numbers.quantize` gives them."""
        stored = codes.codes
        if self.config.weights == "int4":
            stored = pack_int4(stored)
        elif self.config.weights == "float8":
            stored = stored.view(torch.uint8)
        self.codes = stored.to(self.codes.device)
        self.scales = codes.scales.to(self.scales.device, torch.float32)
        self.zeros = None if codes.zeros is None else codes.zeros.to(self.scales.device)

    def unpacked(self) -> Codes:
        """Codes [out, in] in a byte each, scales and zeros; columns lie as :attr:`order` says."""
        codes = self.codes
        if self.config.weights == "int4":
            codes = unpack_int4(codes, self.in_features)
        elif self.config.weights == "float8":
            codes = codes.view(FLOAT8)
        return Codes(codes, self.scales, self.zeros)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for: [out, in] float32."""
        return in_order(dequantize(self.unpacked(), self.group_length), self.order)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in] → [..., out], in the dtype of the inputs"""
        product = self.product(inputs)
        return product if self.bias is None else product + self.bias

    def product(self, inputs: Tensor) -> Tensor:
        """:meth:`forward` without the bias."""
        if self.config.activations == "int8":
            inputs = rounded_activations(inputs)
        found: Tensor = _Product.apply(inputs, self)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves go for all; conversions of dtype leave the scales in float32."""
        scales, probe = self.scales, torch.empty(0, dtype=self.dtype, device=self.codes.device)
        self.dtype = fn(probe).dtype
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Shown when a model is printed."""
        kind = f"{self.config.weights}, groups of {self.group_length}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def rounded_activations(inputs: Tensor) -> Tensor:
    """Inputs as 8 bits say them; gradients pass as if nothing had been rounded."""
    codes, scales = round_rows(inputs.detach())
    said = (codes * scales).to(inputs.dtype)
    return inputs + (said - inputs.detach()) if inputs.requires_grad else said


class _Product(torch.autograd.Function):
    """inputs · Wᵀ, whose backward pass makes W anew instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, linear: QuantizedLinear) -> Tensor:
        ctx.linear = linear
        return F.linear(inputs, linear.dequantize().to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0]
        return gradient @ ctx.linear.dequantize().to(gradient.dtype), None
