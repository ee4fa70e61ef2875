"""Every field of the architecture does what it says."""

from __future__ import annotations

import pytest
import torch

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.model import MegatronLmDecoder

IDS = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(1))


def names(model: MegatronLmDecoder) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def shape(model: MegatronLmDecoder, name: str) -> list[int]:
    return list(model.get_parameter(name).shape)


def test_sizes(make_model):
    model = make_model(
        vocab_size=31, hidden_size=16, num_hidden_layers=3, num_attention_heads=8, intermediate_size=40
    )
    assert shape(model, "embedding.tokens.weight") == [31, 16]
    assert list(model.layers) == ["0", "1", "2"]
    assert shape(model, "layers.2.mlp.up.weight") == [40, 16]
    assert model.layers["0"].attention.head_size == 2
    assert model(IDS % 31).logits.shape == (2, 9, 31)


def test_the_mlp_is_four_times_as_wide_by_default(make_model):
    assert shape(make_model(), "layers.0.mlp.down.weight") == [24, 96]


def test_head_dim_and_grouped_heads(make_model):
    model = make_model(head_dim=10, num_key_value_heads=2)
    assert shape(model, "layers.0.attention.query.weight") == [40, 24]
    assert shape(model, "layers.0.attention.key.weight") == [20, 24]
    assert shape(model, "layers.0.attention.output.weight") == [24, 40]
    assert make_model().config.key_value_heads == 4


def test_grouped_heads_share_keys_and_values(make_model):
    """Two query heads on one key head equal full attention with that key head repeated."""
    grouped = make_model(num_key_value_heads=2).eval()
    full = make_model(num_key_value_heads=4).eval()
    state = grouped.state_dict()
    for name in list(state):
        if ".key." in name or ".value." in name:
            state[name] = state[name].unflatten(0, (2, 1, 6)).repeat_interleave(2, dim=1).flatten(0, 2)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(IDS).logits, full(IDS).logits)


def test_learned_positions_have_a_row_each_and_rotary_none(make_model):
    assert shape(make_model(), "embedding.positions.weight") == [32, 24]
    for kind in ("rotary", "none"):
        assert "embedding.positions.weight" not in names(make_model(position_embedding=kind))


@pytest.mark.parametrize(("kind", "sees_order"), [("learned", True), ("rotary", True), ("none", False)])
def test_order_matters_with_positions_only(make_model, kind, sees_order):
    """Without positions the last token's prediction does not depend on the order of those before."""
    model = make_model(position_embedding=kind, num_hidden_layers=1).eval()
    shuffled = IDS[:, [3, 0, 2, 1, 7, 6, 5, 4, 8]]
    same = torch.allclose(model(IDS).logits[:, -1], model(shuffled).logits[:, -1], atol=1e-5)
    assert same is not sees_order


def test_rotary_base_and_percent_change_the_result(make_model):
    logits = [
        make_model(position_embedding="rotary", **fields).eval()(IDS).logits
        for fields in ({}, {"rotary_base": 500.0}, {"rotary_percent": 0.34})
    ]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_normalization_kinds_and_epsilon(make_model):
    for kind, module in (("layernorm", torch.nn.LayerNorm), ("rmsnorm", torch.nn.RMSNorm)):
        model = make_model(normalization=kind, layernorm_eps=0.125)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm)]
        assert len(norms) == 5
        assert all(isinstance(norm, module) and norm.eps == 0.125 for norm in norms)


def test_tied_and_untied_heads(make_model):
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    assert tied.head.output.weight is tied.embedding.tokens.weight
    assert untied.head.output.weight is not untied.embedding.tokens.weight
    assert not torch.equal(untied.head.output.weight, untied.embedding.tokens.weight)
    size = 53 * 24
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] == counts[0] + size


def test_the_tied_matrix_gets_both_gradients(make_model):
    tied, untied = make_model(), make_model(tie_word_embeddings=False)
    state = tied.state_dict()
    untied.load_state_dict(state)
    for model in (tied, untied):
        model(IDS, IDS).loss.backward()
    both = untied.embedding.tokens.weight.grad + untied.head.output.weight.grad
    torch.testing.assert_close(tied.embedding.tokens.weight.grad, both)


@pytest.mark.parametrize(
    ("fields", "biased"),
    [
        (dict(), {"query", "key", "value", "output", "up", "down"}),
        (dict(attention_bias=False), {"up", "down"}),
        (dict(mlp_bias=False), {"query", "key", "value", "output"}),
        (dict(attention_output_bias=False), {"query", "key", "value", "up", "down"}),
        (dict(attention_bias=False, attention_output_bias=True), {"output", "up", "down"}),
        (
            dict(activation_function="swiglu"),
            {"query", "key", "value", "output", "up", "gate", "down"},
        ),
    ],
)
def test_biases(make_model, fields, biased):
    model = make_model(**fields)
    found = {name.split(".")[-2] for name in names(model) if name.endswith(".bias") and "norm" not in name}
    assert found == biased
    assert "head.output.bias" not in names(model)


def test_query_and_key_norms(make_model):
    model = make_model(qk_normalization=True)
    assert shape(model, "layers.0.attention.query_norm.weight") == [6]
    assert shape(model, "layers.1.attention.key_norm.weight") == [6]
    scaled = make_model(qk_normalization=True)
    with torch.no_grad():
        for layer in scaled.layers.values():
            layer.attention.query.weight *= 50.0  # the norm takes any scale out again
    torch.testing.assert_close(scaled.eval()(IDS).logits, model.eval()(IDS).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout"])
def test_dropout_acts_in_training_only(make_model, field):
    model, plain = make_model(**{field: 0.5}), make_model()
    torch.testing.assert_close(model.eval()(IDS).logits, plain.eval()(IDS).logits)
    model.train()
    assert not torch.allclose(model(IDS).logits, plain(IDS).logits)
    torch.manual_seed(3)
    first = model(IDS).logits
    torch.manual_seed(3)
    assert torch.equal(first, model(IDS).logits)


def test_hidden_dropout_is_after_the_embedding_too(make_model):
    model = make_model(hidden_dropout=0.9).train()
    dropped = model.embedding(IDS, torch.arange(9)[None])
    assert 0.8 < float((dropped == 0).float().mean()) < 0.97


def test_enable_input_require_grads(make_model):
    """With every weight frozen, gradients still reach the embedding's output: adapters need that."""
    for enabled in (False, True):
        model = make_model(enable_input_require_grads=enabled).requires_grad_(False)
        assert model(IDS).logits.requires_grad is enabled
        with torch.no_grad():
            assert not model(IDS).logits.requires_grad


def test_the_cache_and_layout_fields_change_no_number(make_model):
    plain = make_model().eval()(IDS).logits
    fields = dict(use_cache=False, parallel_output=False, pre_process_first=False, post_process_last=False)
    assert torch.equal(make_model(**fields).eval()(IDS).logits, plain)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(vocab_size=0), ["vocab_size"]),
        (dict(hidden_size=-1, num_hidden_layers=0), ["hidden_size", "num_hidden_layers"]),
        (dict(num_attention_heads=7), ["num_attention_heads"]),
        (dict(num_key_value_heads=5), ["num_key_value_heads"]),
        (dict(activation_function="mish"), ["activation_function"]),
        (dict(hidden_dropout=1.0, layernorm_eps=0.0), ["layernorm_eps", "hidden_dropout"]),
        (dict(output_layer_init_method="ones"), ["output_layer_init_method"]),
        (dict(position_embedding="rotary", rotary_percent=0.01), ["rotary_percent"]),
        (dict(quantize_config={"weights": "int4"}), ["quantize_config"]),
        (dict(quantize=True, quantize_config={"bits": 4}), ["quantize_config.bits"]),
    ],
)
def test_every_wrong_value_is_named(fields, named):
    with pytest.raises(ConfigError) as caught:
        MegatronModelConfig(**fields)
    assert [problem.split()[0] for problem in caught.value.problems] == named


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean.*mt-nlg-530b"):
        MegatronModelConfig.from_preset("mtnlg-530b")
    assert MegatronModelConfig.from_preset("gpt2", vocab_size=99).vocab_size == 99
