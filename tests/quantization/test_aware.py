"""Quantization-aware training: the loss is that of the rounded model, the gradient reaches the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.training.helpers import metrics_lines, small_config, train_here

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.config import ConfigError, LayoutConfig, PrecisionConfig, RunConfig
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.quantization import dequantize, quantize, quantize_model, round_in_training
from mtnlg.quantization.aware import rounded_weight

INT4 = dict(weights="int4", group_size=8, head="same")


def test_the_gradient_passes_the_rounding():
    weight = torch.randn(5, 12, requires_grad=True)
    config = QuantizeConfig("int4", 4)
    rounded = rounded_weight(weight, config)
    assert torch.equal(rounded, dequantize(quantize(weight.detach(), config), 4))
    output = torch.randn(5, 12)
    (gradient,) = torch.autograd.grad(rounded, weight, output)
    assert torch.equal(gradient, output)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_it_computes_what_the_quantized_model_will(activations):
    config = QuantizeConfig("int4", 8, activations=activations, head="same")
    model = MegatronLmModel(
        MegatronModelConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, init_method_std=0.2,
        )
    ).eval()  # fmt: skip
    trained = copy.deepcopy(model)
    names = [name for name, _ in trained.named_parameters()]
    round_in_training(trained, config)
    quantize_model(model, config)
    ids = torch.randint(0, 31, (2, 9))
    torch.testing.assert_close(trained(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    logits = model(ids).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, ids.flatten(), reduction="sum")
    torch.testing.assert_close(trained(ids, ids).loss, expected)
    trained(ids, ids).loss.backward()
    assert [name for name, _ in trained.named_parameters()] == names
    assert all(parameter.grad is not None for parameter in trained.parameters())


def trained_run(folder, **quantization):
    config = small_config(folder)
    fields = {**config.model.to_dict(), **quantization}
    config.model = MegatronModelConfig(**fields)
    train_here(config)
    return config


def test_a_run_learns_under_rounding_and_opens_quantized(tmp_path):
    config = trained_run(tmp_path, quantize=True, quantize_config=INT4)
    losses = [line["loss"] for line in metrics_lines(config) if "loss" in line]
    assert losses[-1] < losses[0]
    found = MegatronLmModel.from_pretrained(config.run_dir)
    assert found.config.quantize and found.layers["0"].mlp.up.config.weights == "int4"
    plain = MegatronLmModel.from_pretrained(config.run_dir, quantize=False)
    round_in_training(plain, QuantizeConfig.from_dict(INT4))
    ids = torch.randint(0, 37, (3, 12))
    torch.testing.assert_close(found(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_does_not_go_with_it_is_refused():
    model = MegatronModelConfig(num_attention_heads=4, hidden_size=64, quantize=True)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 2.*matrices are rounded whole"):
        RunConfig(model=model, layout=LayoutConfig(tensor_parallel_size=2))
    with pytest.raises(ConfigError, match=r"precision.fp8 is true"):
        RunConfig(model=model, precision=PrecisionConfig(dtype="bf16", fp8=True))
