from __future__ import annotations

import math

import pytest
import torch

from mtnlg.model import MegatronLmDecoder, initial_value, initialize_weights

WIDE = dict(hidden_size=128, num_hidden_layers=3, vocab_size=500, init_method_std=0.02)
RESIDUAL_OUTPUTS = ("attention.output.weight", "mlp.down.weight")


@pytest.mark.parametrize("method", [None, "scaled_normal", "normal", "zeros"])
@pytest.mark.parametrize("family", [{}, dict(activation_function="swiglu", normalization="rmsnorm")])
def test_the_spread_of_every_parameter(make_model, method, family):
    model = make_model(output_layer_init_method=method, tie_word_embeddings=False, **WIDE, **family)
    outputs = {None: 0.02 / math.sqrt(6), "normal": 0.02, "zeros": 0.0}
    outputs["scaled_normal"] = outputs[None]
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == (0.0 if name.endswith(".bias") else 1.0)).all(), name
            continue
        expected = outputs[method] if name.endswith(RESIDUAL_OUTPUTS) else 0.02
        spread = expected / math.sqrt(2 * parameter.numel())  # of a standard deviation as measured
        assert abs(float(parameter.detach().std(correction=0)) - expected) <= 5 * spread, name
        assert abs(float(parameter.detach().mean())) <= 5 * expected / math.sqrt(parameter.numel()), name


def test_without_a_given_spread_it_is_mt_nlgs(make_model):
    model = make_model(**{**WIDE, "init_method_std": None})
    expected = math.sqrt(1 / (3 * 128))
    assert float(model.embedding.tokens.weight.detach().std()) == pytest.approx(expected, rel=0.02)


def test_zeros_make_every_layer_the_identity(make_model):
    model = make_model(output_layer_init_method="zeros").eval()
    hidden = torch.randn(1, 4, 24)
    assert torch.equal(model.layers["1"](hidden), hidden)


def test_a_parameter_depends_on_seed_and_name_alone(make_model, config):
    model = make_model(seed=5)
    for name, parameter in model.named_parameters():
        again = initial_value(name, parameter.shape, model.config, seed=5)
        assert torch.equal(parameter, again), name
    matrices = [p for p in model.parameters() if p.shape == (24, 24)]
    assert len({float(matrix[0, 0]) for matrix in matrices}) == len(matrices)
    assert not torch.equal(make_model(seed=6).get_parameter("layers.0.mlp.up.weight"),
                           model.get_parameter("layers.0.mlp.up.weight"))  # fmt: skip


def test_more_layers_leave_the_others_alone(make_model):
    few, many = make_model(num_hidden_layers=1), make_model(num_hidden_layers=4)
    name = "layers.0.attention.query.weight"
    assert torch.equal(few.get_parameter(name), many.get_parameter(name))


def test_a_model_from_meta_gets_the_same_numbers(make_model, config):
    with torch.device("meta"):
        model = MegatronLmDecoder(config())
    model.to_empty(device="cpu")
    model.tie_weights()
    initialize_weights(model, model.config, seed=0)
    for (name, mine), theirs in zip(model.named_parameters(), make_model().parameters()):
        assert torch.equal(mine, theirs), name
    assert model.head.output.weight is model.embedding.tokens.weight
