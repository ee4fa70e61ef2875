"""``quantize=True``: which layers are exchanged, from the start, from files, and what stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtnlg import MegatronLmModel, MegatronModelConfig
from mtnlg.config import CheckpointError, ConfigError
from mtnlg.quantization import QuantizedLinear, quantize_model, quantized_linears

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
SHAPE = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40
)
LLAMA = dict(
    position_embedding="rotary", normalization="rmsnorm", activation_function="swiglu",
    attention_bias=False, mlp_bias=False, tie_word_embeddings=False, num_key_value_heads=2,
)  # fmt: skip


def make(**fields):
    return MegatronLmModel(MegatronModelConfig(**{**SHAPE, "init_method_std": 0.2, **fields})).eval()


@pytest.mark.parametrize("family", [{}, LLAMA], ids=["gpt2", "llama"])
def test_the_constructor_quantizes_the_linear_layers(family):
    plain, quantized = make(**family), make(**family, quantize=True)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    assert len(quantized_linears(quantized)) == sum(type(m) is nn.Linear for m in plain.modules())
    torch.testing.assert_close(quantized(IDS).logits, plain(IDS).logits, atol=0.15, rtol=0.1)
    assert not torch.equal(quantized(IDS).logits, plain(IDS).logits)
    assert quantized.num_parameters == plain.num_parameters
    assert quantized.generate([3, 4, 5], max_new_tokens=4)[:3] == [3, 4, 5]


def test_quantize_config_says_how():
    model = make(quantize=True, quantize_config=dict(weights="int4", group_size=8, head="float"))
    assert type(model.head.output) is nn.Linear
    assert model.head.output.weight is model.embedding.tokens.weight
    query = model.layers["0"].attention.query
    assert isinstance(query, QuantizedLinear) and query.scales.shape == (32, 4)
    same = make(quantize=True, quantize_config=dict(weights="int4", head="same"))
    assert same.head.output.config.weights == "int4"


def test_the_head_takes_8_bits_by_default_and_the_embedding_stays():
    model = make(quantize=True, quantize_config=dict(weights="int4"))
    assert model.head.output.config.weights == "int8"
    model.tie_weights()  # leaves a quantized head alone
    assert isinstance(model.head.output, QuantizedLinear)
    assert torch.equal(model.embedding.tokens.weight, make().embedding.tokens.weight)


def test_the_loss_goes_through_a_quantized_head():
    model = make(quantize=True)
    logits = model(IDS).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten(), reduction="sum")
    torch.testing.assert_close(model(IDS, IDS).loss, expected)
    model.bfloat16()
    assert torch.isfinite(model(IDS, IDS).loss)


def test_on_meta_there_are_shapes_alone():
    with torch.device("meta"):
        model = MegatronLmModel(MegatronModelConfig(**SHAPE, quantize=True))
    assert model.layers["0"].mlp.up.codes.is_meta and model.layers["0"].mlp.up.codes.shape == (128, 32)


@pytest.mark.parametrize("family", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("asked", [True, dict(weights="int4", symmetric=False)])
def test_from_pretrained_quantizes_what_it_reads(tmp_path, family, asked):
    plain = make(**family)
    plain.save_pretrained(tmp_path)
    found = MegatronLmModel.from_pretrained(tmp_path, quantize=asked)
    config = {} if asked is True else dict(quantize_config=asked)
    assert torch.equal(found(IDS).logits, make(**family, quantize=True, **config)(IDS).logits)
    assert found.config.quantize
    half = MegatronLmModel.from_pretrained(tmp_path, quantize=asked, dtype=torch.bfloat16)
    assert half(IDS).logits.dtype == torch.bfloat16
    assert half.layers["0"].mlp.up.scales.dtype == torch.float32


def test_wrong_settings_are_named(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"quantize_config.bits is not a setting"):
        MegatronLmModel.from_pretrained(tmp_path, quantize=dict(bits=4))


def test_codes_of_another_kind_are_refused():
    from mtnlg.quantization import codes_of_weights

    eight, four = make(quantize=True), make(quantize=True, quantize_config=dict(weights="int4"))
    with pytest.raises(CheckpointError, match=r"query.codes has torch.int8, and int4 is kept in"):
        codes_of_weights(four, dict(eight.state_dict()))


def test_a_stage_or_any_module_can_be_quantized():
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    from mtnlg.config.quantize import QuantizeConfig

    quantize_model(block, QuantizeConfig())
    assert list(quantized_linears(block)) == ["0", "2"]
