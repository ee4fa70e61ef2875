"""GPTQ and AWQ lose less than rounding to the nearest on what the layers really see."""

from __future__ import annotations

import pytest
import torch

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.config import ConfigError
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization import QuantizedLinear, calibrate, dequantize, quantize
from mtnlg.quantization.awq import Scaling, best_factors, fold
from mtnlg.quantization.gptq import quantize_gptq
from mtnlg.quantization.scales import best_scales

INT4 = QuantizeConfig("int4", 16)
GENERATOR = torch.Generator().manual_seed(2)
WEIGHT = torch.randn(24, 48, generator=GENERATOR)
# Inputs that depend on each other, some of them much larger than others.
INPUTS = torch.randn(400, 12, generator=GENERATOR) @ torch.randn(12, 48, generator=GENERATOR)
INPUTS += 0.1 * torch.randn(400, 48, generator=GENERATOR)
INPUTS[:, ::7] *= 8


def output_error(weight):
    return float((INPUTS @ (weight - WEIGHT).T).square().mean())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 0])
def test_gptq_changes_the_outputs_less(group_size, symmetric):
    config = QuantizeConfig("int4", group_size, symmetric)
    length = group_size or 48
    nearest = output_error(dequantize(quantize(WEIGHT, config), length))
    gptq = output_error(dequantize(quantize_gptq(WEIGHT, INPUTS.T @ INPUTS, config), length))
    assert gptq < 0.3 * nearest


def test_gptq_on_inputs_that_know_nothing_of_each_other_rounds_to_the_nearest():
    codes = quantize_gptq(WEIGHT, torch.eye(48), QuantizeConfig("int8", 0))
    steps = ((dequantize(codes, 48) - WEIGHT) / codes.scales).abs()
    inside = codes.codes.abs() < 127  # what is cut off lies further away
    assert float(steps[inside].max()) <= 0.5 + 1e-4


def test_gptq_bears_inputs_that_are_never_seen_or_always_the_same():
    inputs = INPUTS.clone()
    inputs[:, 5] = 0
    inputs[:, 6] = inputs[:, 7]
    codes = quantize_gptq(WEIGHT, inputs.T @ inputs, INT4)
    assert torch.isfinite(dequantize(codes, 16)).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_best_scales_cost_no_more_than_the_widest(symmetric):
    config = QuantizeConfig("int4", 16, symmetric)
    grouped, importance = WEIGHT.unflatten(1, (3, 16)), INPUTS.square().mean(0).unflatten(0, (3, 16))
    from mtnlg.quantization.numbers import Codes, rounded, scales_and_zeros

    def cost(scales, zeros):
        own = None if zeros is None else zeros[..., None]
        codes = rounded(grouped, scales[..., None], own, config).flatten(1)
        said = dequantize(Codes(codes, scales, zeros), 16).unflatten(1, (3, 16))
        return ((said - grouped).square() * importance).sum(-1)

    best, widest = best_scales(grouped, importance, config), scales_and_zeros(grouped, config)
    assert (cost(*best) <= cost(*widest) + 1e-5).all()
    assert cost(*best).sum() < 0.95 * cost(*widest).sum()


def test_awq_finds_factors_that_help_and_change_nothing_in_floats():
    norm, linear = torch.nn.LayerNorm(48), torch.nn.Linear(48, 24)
    with torch.no_grad():
        norm.weight.copy_(INPUTS.std(0))
        linear.weight.copy_(WEIGHT)
    stream = torch.randn(300, 48, generator=GENERATOR)
    before = linear(norm(stream))
    scaling = Scaling(norm, [linear], norm(stream).detach())
    factors = best_factors(scaling, INT4)
    plain = dequantize(quantize(linear.weight.detach(), INT4), 16)
    fold(scaling, factors)
    torch.testing.assert_close(linear(norm(stream)), before, atol=1e-4, rtol=1e-4)
    scaled = dequantize(quantize(linear.weight.detach(), INT4), 16)
    after = float((norm(stream) @ scaled.T + linear.bias - before).detach().square().mean())
    without = float((scaling.inputs @ (plain - WEIGHT).T).square().mean())
    assert after < 0.8 * without


FAMILIES = {
    "gpt2": {},
    "llama": dict(
        position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu",
        attention_bias=False, mlp_bias=False, tie_word_embeddings=False, num_key_value_heads=2,
    ),
    "gemma": dict(normalization="rmsnorm_1p", norm_placement="around", activation_function="geglu"),
    "opt-350m": dict(norm_placement="after"),
    "neox": dict(parallel_residual=True, position_embedding="rotary"),
}  # fmt: skip


def make(family):
    torch.manual_seed(4)
    config = MegatronModelConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=40, init_method_std=0.15, **FAMILIES[family],
    )  # fmt: skip
    model = MegatronLmModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    return model


BATCHES = [torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(n)) for n in range(4)]


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_model_is_nearer_to_the_float_one(family, method):
    config = QuantizeConfig("int4", 16, head="same")
    expected = make(family)(BATCHES[0]).logits
    error = {}
    told = []
    for name in ("rtn", method):
        model = make(family)
        calibrate(model, config, name, BATCHES, lambda done, of: told.append((done, of)))
        assert type(model.head.output) is QuantizedLinear
        error[name] = float((model(BATCHES[0]).logits - expected).detach().norm())
    assert told == [(1, 2), (2, 2)]
    assert error[method] < (0.8 if method == "gptq" else 1.05) * error["rtn"]


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(ConfigError, match=r"method is 'gtpq': choose one of rtn, gptq, awq"):
        calibrate(make("gpt2"), INT4, "gtpq", BATCHES)
    with pytest.raises(ConfigError, match=r"the calibration text is empty"):
        calibrate(make("gpt2"), INT4, "gptq", [])
