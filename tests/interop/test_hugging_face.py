"""Both ways, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop import read_config, read_weights, write_hugging_face
from mtnlg.model import MegatronLmDecoder, initialize_weights

SHAPE: dict[str, Any] = dict(
    vocab_size=71,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=56,
    max_position_embeddings=40,
    init_method_std=0.15,
)
LLAMA: dict[str, Any] = dict(
    position_embedding="rotary",
    normalization="rmsnorm",
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    num_key_value_heads=2,
    rotary_base=5e5,
)
CASES: dict[str, dict[str, Any]] = {
    "gpt2": dict(activation_function="gelu_tanh", hidden_dropout=0.1),
    "gpt2-gelu-untied": dict(tie_word_embeddings=False, layernorm_eps=1e-3),
    "gpt2-squared-relu": dict(activation_function="squared_relu"),
    "llama": dict(**LLAMA, tie_word_embeddings=False),
    "llama-tied": LLAMA,
    "llama-biases-geglu": LLAMA | dict(attention_bias=True, mlp_bias=True, activation_function="geglu"),
    "llama-head-dim": LLAMA | dict(head_dim=16),
    "qwen2": LLAMA | dict(attention_bias=True, attention_output_bias=False, layernorm_eps=1e-6),
    "qwen2-head-dim": LLAMA | dict(attention_bias=True, attention_output_bias=False, head_dim=16),
    "qwen3": LLAMA | dict(qk_normalization=True, head_dim=12, tie_word_embeddings=False),
    "qwen3-biases": LLAMA | dict(qk_normalization=True, attention_bias=True),
}
IDS = torch.randint(0, 71, (2, 23), generator=torch.Generator().manual_seed(5))


def random_model(**fields: Any) -> MegatronLmDecoder:
    config = MegatronModelConfig(**{**SHAPE, **fields})
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, else mixing them up shows nothing
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def load(folder: Path) -> MegatronLmDecoder:
    config = read_config(folder)
    model = MegatronLmDecoder(config)
    model.load_state_dict(read_weights(folder, config))
    return model.eval()


def our_logits(model: MegatronLmDecoder) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs the interop extra (transformers)")


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_what_we_write(transformers, tmp_path, name):
    model = random_model(**CASES[name])
    write_hugging_face(model, tmp_path, end_of_text_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.config.model_type == name.split("-")[0]
    with torch.no_grad():
        logits = theirs(IDS).logits
    torch.testing.assert_close(our_logits(model), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_we_read_back_what_we_write(tmp_path, name):
    model = random_model(**CASES[name])
    write_hugging_face(model, tmp_path, max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    again = load(tmp_path)
    assert again.config == model.config
    assert torch.equal(our_logits(again), our_logits(model))


THEIRS = {
    "GPT2": dict(vocab_size=71, n_embd=32, n_layer=2, n_head=4, n_positions=40),
    "Llama": dict(num_key_value_heads=2, rope_theta=1e5, max_position_embeddings=40),
    "Qwen2": dict(num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=40),
    "Qwen3": dict(num_key_value_heads=1, head_dim=20, max_position_embeddings=40),
}


@pytest.mark.parametrize("family", THEIRS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_we_compute_what_transformers_writes(transformers, tmp_path, family, max_shard_size):
    fields = dict(THEIRS[family])
    if family != "GPT2":
        fields |= dict(
            vocab_size=71, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
    config = getattr(transformers, f"{family}Config")(**fields, initializer_range=0.2)
    class_name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    theirs = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        logits = theirs(IDS).logits
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    torch.testing.assert_close(our_logits(load(tmp_path)), logits, atol=1e-4, rtol=1e-4)


def test_names_without_the_prefix_and_old_buffers_are_understood(tmp_path):
    """The files of the original GPT-2 are those of the bare model, with its attention masks."""
    from safetensors.torch import load_file, save_file

    model = random_model(**CASES["gpt2"])
    write_hugging_face(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file)
    assert torch.equal(our_logits(load(tmp_path)), our_logits(model))


def test_a_changed_config_json_wins_over_our_own_copy(tmp_path):
    write_hugging_face(random_model(**CASES["llama"], output_layer_init_method="zeros"), tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    saved["max_position_embeddings"] = 16
    path.write_text(json.dumps(saved))
    config = read_config(tmp_path)
    assert config.max_position_embeddings == 16
    assert config.output_layer_init_method == "zeros"


def test_weights_can_be_saved_in_another_precision(tmp_path):
    model = random_model(**CASES["llama"])
    write_hugging_face(model, tmp_path, dtype=torch.bfloat16)
    state = read_weights(tmp_path, model.config)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_tie_survives(tmp_path):
    write_hugging_face(random_model(**CASES["gpt2"]), tmp_path)
    state = read_weights(tmp_path, read_config(tmp_path))
    assert state["head.output.weight"] is state["embedding.tokens.weight"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(position_embedding="none"), ["position_embedding"]),
        (dict(mlp_bias=False), ["mlp_bias"]),
        (dict(num_key_value_heads=2), ["num_key_value_heads"]),
        (LLAMA | dict(rotary_percent=0.5, attention_bias=True), ["rotary_percent"]),
        (LLAMA | dict(normalization="layernorm"), ["normalization"]),
        (LLAMA | dict(activation_function="relu"), ["activation_function"]),
        (LLAMA | dict(qk_normalization=True, mlp_bias=True), ["qk_normalization"]),
    ],
)
def test_a_model_that_no_family_computes_is_refused_by_field(tmp_path, fields, named):
    model = random_model(**fields)
    with pytest.raises(ConfigError, match="nearest is") as caught:
        write_hugging_face(model, tmp_path / "out")
    assert [problem.split()[0] for problem in caught.value.problems[1:]] == named
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mamba"), "model_type is 'mamba'"),
        (dict(rope_parameters=dict(rope_type="axial", factor=8.0, rope_theta=5e5)), "axial"),
        (dict(hidden_act="mish"), "mish"),
        (dict(quantization_config=dict(bits=4)), "quantization_config"),
        (dict(partial_rotary_factor=0.5, rope_parameters=None), "partial_rotary_factor"),
        (dict(num_hidden_layers=4), "input_layernorm.weight is missing"),
        (dict(num_hidden_layers=2), "belongs to no parameter"),
    ],
)
def test_what_we_cannot_compute_is_refused(tmp_path, change, message):
    write_hugging_face(random_model(**CASES["llama"]), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_broken_and_missing_json(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="broken JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        read_config(tmp_path)


def test_a_meta_model_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        model = MegatronLmDecoder(MegatronModelConfig(**SHAPE))
    with pytest.raises(CheckpointError, match="no weights"):
        write_hugging_face(model, tmp_path)
