"""Codes say what weights were, within half a step, in every kind of number."""

from __future__ import annotations

import pytest
import torch

from mtnlg.config import ConfigError
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization import dequantize, quantize
from mtnlg.quantization.numbers import group_length, pack_int4, round_rows, unpack_int4

WEIGHT = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.mark.parametrize("group_size", [0, 10, 16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_every_weight_is_within_half_a_step(weights, symmetric, group_size):
    config = QuantizeConfig(weights, group_size, symmetric)
    codes = quantize(WEIGHT, config)
    length = group_length(config, 50)
    said = dequantize(codes, length)
    step = codes.scales.repeat_interleave(length, 1)[:, :50]
    # The largest of a symmetric range ends half a step beyond the last code; a zero point is rounded too.
    assert ((said - WEIGHT).abs() <= step * (0.5 if symmetric else 1.0) + 1e-6).all()
    assert codes.codes.shape == WEIGHT.shape and codes.codes.dtype == torch.int8
    assert codes.scales.shape == (7, -(-50 // length))
    assert (codes.zeros is None) == symmetric


def test_float8_keeps_three_bits_of_mantissa():
    codes = quantize(WEIGHT, QuantizeConfig("float8"))
    said = dequantize(codes, 50)
    assert codes.codes.dtype == torch.float8_e4m3fn
    assert ((said - WEIGHT).abs() <= WEIGHT.abs() / 16 + codes.scales * 2**-9).all()


def test_a_zero_point_halves_the_error_of_what_is_on_one_side():
    positive = WEIGHT.abs()
    errors = [
        float((dequantize(quantize(positive, QuantizeConfig("int4", 0, symmetric)), 50) - positive).norm())
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_a_row_of_zeros_stays_zero():
    for weights in ("int8", "int4", "float8"):
        said = dequantize(quantize(torch.zeros(2, 8), QuantizeConfig(weights)), 8)
        assert torch.equal(said, torch.zeros(2, 8))


@pytest.mark.parametrize("inputs", [6, 7])
def test_two_codes_share_a_byte(inputs):
    codes = torch.randint(-8, 8, (5, inputs), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (5, 3 if inputs == 6 else 4) and packed.dtype == torch.uint8
    assert torch.equal(unpack_int4(packed, inputs), codes)
    assert int(packed[0, 0] & 15) == int(codes[0, 0]) % 16  # the even input is in the low half


def test_a_row_of_activations_is_rounded_by_itself():
    rows = torch.randn(3, 20)
    rows[1] *= 1000
    codes, scales = round_rows(rows)
    alone = round_rows(rows[:1])
    assert torch.equal(codes[:1], alone[0]) and torch.equal(scales[:1], alone[1])
    assert ((codes * scales - rows).abs() <= scales / 2 * 1.001).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": "int3"}, "quantize_config.weights is 'int3': choose one of int8, int4, float8"),
        ({"group_size": 7}, "group_size is 7: it must be an even number"),
        ({"group_size": "x"}, "group_size is 'x'"),
        ({"symmetric": 1}, "symmetric is 1: expected true or false"),
        ({"weights": "float8", "symmetric": False}, "float8 has no zero point"),
        ({"weight": "int8"}, "quantize_config.weight is not a setting: did you mean weights"),
        ({"head": "none", "activations": "int4"}, "activations is 'int4'.*\n.*head is 'none'"),
    ],
)
def test_what_is_wrong_is_named(values, said):
    with pytest.raises(ConfigError, match=said):
        QuantizeConfig.from_dict(values)
