"""Families with experts, both ways, against transformers itself."""

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
    num_key_value_heads=2,
    intermediate_size=56,
    max_position_embeddings=40,
    init_method_std=0.15,
    position_embedding="rotary",
    normalization="rmsnorm",
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    num_experts=6,
    num_experts_per_token=2,
    moe_intermediate_size=24,
)
GLM = dict(router_load_balancing="bias", router_score_function="sigmoid", num_shared_experts=2)
CASES: dict[str, dict[str, Any]] = {
    "mixtral": dict(tie_word_embeddings=False, router_z_loss_coefficient=0.1),
    "mixtral-tied-head-dim": dict(head_dim=12, num_experts_per_token=3),
    "qwen3_moe": dict(qk_normalization=True, head_dim=12, router_load_balancing="none"),
    "qwen3_moe-dense-layers": dict(
        qk_normalization=True,
        num_dense_layers_first=1,
        moe_layer_interval=2,
        num_hidden_layers=4,
        normalize_router_weights=False,
        attention_bias=True,
    ),
    "glm4_moe": GLM | dict(num_dense_layers_first=1, router_scaling_factor=1.5),
    "glm4_moe-qk-bias": GLM | dict(qk_normalization=True, attention_bias=True, attention_output_bias=False),
}
IDS = torch.randint(0, 71, (2, 23), generator=torch.Generator().manual_seed(5))


def random_model(**fields: Any) -> MegatronLmDecoder:
    config = MegatronModelConfig(**{**SHAPE, **fields})
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # else mixing them up shows nothing
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
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
    torch.testing.assert_close(our_logits(model), logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_we_read_back_what_we_write(tmp_path, name):
    model = random_model(**CASES[name])
    write_hugging_face(model, tmp_path, max_shard_bytes=20_000)
    again = load(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


THEIRS: dict[str, dict[str, Any]] = {
    "Mixtral": dict(num_local_experts=5, router_aux_loss_coef=0.02, sliding_window=None),
    "Qwen3Moe": dict(num_experts=5, moe_intermediate_size=20, head_dim=8, mlp_only_layers=[0]),
    "Glm4Moe": dict(
        n_routed_experts=5,
        moe_intermediate_size=20,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=1.0),
        num_nextn_predict_layers=0,
    ),
}


@pytest.mark.parametrize("family", THEIRS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_we_compute_what_transformers_writes(transformers, tmp_path, family, max_shard_size):
    common = dict(vocab_size=71, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    common |= dict(num_key_value_heads=2, intermediate_size=48, num_experts_per_tok=2)
    config = getattr(transformers, f"{family}Config")(
        **common, **THEIRS[family], max_position_embeddings=40, initializer_range=0.2
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        logits = theirs(IDS).logits
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    torch.testing.assert_close(our_logits(load(tmp_path)), logits, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_transformers(transformers, tmp_path):
    model = random_model(**CASES["mixtral"], router_load_balancing="none").train()
    model.config.router_z_loss_coefficient = 0.0
    for layer in model.layers.values():
        layer.mlp.router.losses.z_coefficient = 0.0
    write_hugging_face(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    logits = theirs(IDS[:, :-1]).logits
    targets = IDS[:, 1:].flatten()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").backward()
    model(IDS[:, :-1], IDS[:, 1:]).loss.backward()
    block, other = model.layers["1"].mlp, theirs.model.layers[1].mlp
    gate_up = torch.cat([block.experts.gate.grad, block.experts.up.grad], dim=1)
    for ours, their in (
        (gate_up, other.experts.gate_up_proj.grad),
        (block.experts.down.grad, other.experts.down_proj.grad),
        (block.router.weight.grad, other.gate.weight.grad),
        (model.embedding.tokens.weight.grad, theirs.model.embed_tokens.weight.grad),
    ):
        assert float((ours - their).abs().max()) <= 1e-5 * float(their.abs().max())


def test_experts_can_be_saved_in_another_precision(tmp_path):
    model = random_model(**CASES["glm4_moe"])
    write_hugging_face(model, tmp_path, dtype=torch.bfloat16)
    state = read_weights(tmp_path, model.config)
    kept = {name for name, tensor in state.items() if tensor.dtype == torch.float32}
    assert kept == {f"layers.{layer}.mlp.router.selection_bias" for layer in (1, 2)}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(num_shared_experts=1), ["num_shared_experts"]),
        (dict(router_score_function="sigmoid"), ["router_score_function"]),
        (dict(router_load_balancing="bias"), ["router_load_balancing"]),
        (dict(attention_bias=True, num_dense_layers_first=1), ["qk_normalization"]),
        (GLM | dict(moe_layer_interval=2), ["moe_layer_interval"]),
    ],
)
def test_a_mixture_that_no_family_computes_is_refused_by_field(tmp_path, fields, named):
    with pytest.raises(ConfigError, match="nearest is") as caught:
        write_hugging_face(random_model(**fields), tmp_path / "out")
    assert [problem.split()[0] for problem in caught.value.problems[1:]] == named


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3_moe", dict(mlp_only_layers=[1]), "only the first layers"),
        ("glm4_moe", dict(n_group=2), "n_group"),
        ("mixtral", dict(rope_parameters=None, partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("mixtral", dict(num_local_experts=7), "experts.6.w1.weight is missing"),
        ("mixtral", dict(num_local_experts=5), "belongs to no parameter"),
    ],
)
def test_what_we_cannot_compute_is_refused(tmp_path, name, change, message):
    write_hugging_face(random_model(**CASES[name]), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)
