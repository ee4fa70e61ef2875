"""The quantized layer computes with the matrix that its codes stand for, and gradients pass it."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization import QuantizedLinear
from mtnlg.quantization.numbers import round_rows

KINDS = [
    QuantizeConfig("int8"),
    QuantizeConfig("int8", 8, symmetric=False),
    QuantizeConfig("int4", 8),
    QuantizeConfig("int4", 0, symmetric=False),
    QuantizeConfig("float8"),
]


def layer(config, bias=True):
    torch.manual_seed(3)
    linear = nn.Linear(21, 10, bias=bias)
    return linear, QuantizedLinear.of(linear, config)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_forward_and_backward_are_those_of_the_dequantized_matrix(config):
    _, quantized = layer(config)
    inputs = torch.randn(2, 5, 21, requires_grad=True)
    expected = F.linear(inputs, quantized.dequantize(), quantized.bias)
    found = quantized(inputs)
    torch.testing.assert_close(found, expected)
    output = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (inputs, quantized.bias), output)
    torch.testing.assert_close(torch.autograd.grad(found, (inputs, quantized.bias), output), wanted)


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_it_is_near_the_layer_that_it_replaces(config):
    linear, quantized = layer(config)
    inputs = torch.randn(50, 21)
    error = (quantized(inputs) - linear(inputs)).norm() / linear(inputs).norm()
    assert 0 < error < {"int8": 0.01, "int4": 0.15, "float8": 0.05}[config.weights]


def test_activations_in_8_bits_are_those_of_each_row():
    _, quantized = layer(QuantizeConfig("int8", activations="int8"))
    inputs = torch.randn(4, 21, requires_grad=True)
    codes, scales = round_rows(inputs.detach())
    torch.testing.assert_close(
        quantized(inputs), F.linear(codes * scales, quantized.weight, quantized.bias)
    )
    assert torch.equal(quantized(inputs[:1]), quantized(inputs)[:1]) or torch.allclose(
        quantized(inputs[:1]), quantized(inputs)[:1], atol=1e-6
    )
    (gradient,) = torch.autograd.grad(quantized(inputs).sum(), inputs)
    torch.testing.assert_close(gradient, quantized.weight.sum(0).expand(4, -1))  # straight through


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_a_conversion_leaves_codes_and_scales(config):
    _, quantized = layer(config, bias=False)
    before = quantized.dequantize()
    quantized.to(torch.bfloat16)
    assert torch.equal(quantized.dequantize(), before) and quantized.scales.dtype == torch.float32
    assert quantized.weight.dtype == torch.bfloat16
    assert quantized(torch.randn(2, 21, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_state_goes_out_and_in(config):
    _, quantized = layer(config)
    buffer = io.BytesIO()
    torch.save(quantized.state_dict(), buffer)
    buffer.seek(0)
    other = QuantizedLinear.of(nn.Linear(21, 10), config)
    other.load_state_dict(torch.load(buffer))
    inputs = torch.randn(3, 21)
    assert torch.equal(other(inputs), quantized(inputs))
    bytes_of_codes = 10 * (11 if config.weights == "int4" else 21)
    assert quantized.codes.nbytes == bytes_of_codes
