"""Each family of decoders beside transformers, random weights: logits, greedy texts, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop import nearest_architecture, read_config, read_weights, write_hugging_face
from mtnlg.model import MegatronLmDecoder

SHAPE: dict[str, Any] = dict(
    vocab_size=71,
    hidden_size=36,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=44,
    max_position_embeddings=48,
    pad_token_id=None,
)
GROUPED = dict(num_key_value_heads=1)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20, num_key_value_heads=1)
GEMMA = dict(head_dim=10, num_key_value_heads=1)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=12)
SHORT, LONG = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [2.0, 3.0, 4.0, 6.0, 8.0, 9.0]
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=SHORT, long_factor=LONG)
BLOOM: dict[str, Any] = dict(vocab_size=71, hidden_size=36, n_layer=3, pad_token_id=None)
OPT: dict[str, Any] = dict(ffn_dim=44, dropout=0.0)

# name: (transformers' configuration, fields, our fields that must come of them)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("Mistral", GROUPED | dict(sliding_window=5), dict(sliding_window=5)),
    "mixtral": (
        "Mixtral",
        GROUPED | dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=7),
        dict(sliding_window=7, num_experts=5),
    ),
    "llama3": ("Llama", GROUPED | dict(rope_parameters=LLAMA3), dict(rotary_scaling=LLAMA3)),
    "linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0)), {}),
    "dynamic": ("Llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=3.0)), {}),
    "yarn": ("Qwen2", GROUPED | dict(rope_parameters=YARN), {}),
    "yarn-mscale": (
        "Qwen3",
        GROUPED
        | dict(
            head_dim=20,
            rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.3, beta_fast=8.0, truncate=False),
        ),
        {},
    ),
    "qwen2-window": (
        "Qwen2",
        GROUPED | dict(use_sliding_window=True, sliding_window=4, max_window_layers=2),
        dict(sliding_window=4, full_attention_layers=[0, 1]),
    ),
    "qwen3-window": (
        "Qwen3",
        GROUPED | dict(head_dim=12, use_sliding_window=True, sliding_window=4, max_window_layers=0),
        dict(sliding_window=4, full_attention_layers=None),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | dict(shared_expert_intermediate_size=28, mlp_only_layers=[0]),
        dict(shared_expert_gate=True, num_dense_layers_first=1),
    ),
    "qwen3_moe-window": (
        "Qwen3Moe",
        EXPERTS | dict(head_dim=12, use_sliding_window=True, sliding_window=6),
        dict(sliding_window=6),
    ),
    "glm4_moe-partial": (
        "Glm4Moe",
        GROUPED
        | dict(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            head_dim=12,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
            num_nextn_predict_layers=0,
        ),
        dict(rotary_percent=0.5),
    ),
    "phi3": ("Phi3", GROUPED | dict(sliding_window=6), dict(sliding_window=6)),
    "phi3-partial": (
        "Phi3",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)),
        dict(rotary_percent=0.5),
    ),
    "phi3-short": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=40), {}),
    "phi3-long": ("Phi3", dict(rope_parameters=LONGROPE, original_max_position_embeddings=16), {}),
    "gpt_neox": ("GPTNeoX", dict(rotary_pct=0.5), dict(parallel_residual=True, rotary_percent=0.5)),
    "gpt_neox-serial": (
        "GPTNeoX",
        dict(use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, rotary_pct=1.0),
        dict(parallel_residual=False, attention_bias=False),
    ),
    "opt": ("OPT", OPT, dict(position_offset=2)),
    "opt-350m": (
        "OPT",
        OPT | dict(do_layer_norm_before=False, word_embed_proj_dim=20),
        dict(norm_placement="after", embedding_size=20),
    ),
    "opt-no-biases": ("OPT", OPT | dict(enable_bias=False), dict(mlp_bias=False)),
    "bloom": ("Bloom", BLOOM | dict(n_head=4), dict(embedding_norm=True)),
    "bloom-odd": ("Bloom", BLOOM | dict(n_head=6), dict(position_embedding="alibi")),
    "gemma": ("Gemma", GEMMA, dict(embedding_scale=6.0, activation_function="geglu_tanh")),
    "gemma2": (
        "Gemma2",
        GEMMA | dict(sliding_window=5, query_pre_attn_scalar=7, final_logit_softcapping=3.0),
        dict(sliding_window=5, full_attention_layers=[1], attention_scalar=7, attention_softcap=50.0),
    ),
    "gemma2-caps": (
        "Gemma2",
        dict(head_dim=12, num_key_value_heads=3, attn_logit_softcapping=1.5, final_logit_softcapping=None),
        dict(attention_softcap=1.5, logit_softcap=None),
    ),
    "gemma3": (
        "Gemma3Text",
        GEMMA
        | dict(
            sliding_window=5, sliding_window_pattern=2, rope_scaling=dict(rope_type="linear", factor=8.0)
        ),
        dict(rotary_local_base=1e4, rotary_base=1e6, full_attention_layers=[1]),
    ),
}
IDS = torch.randint(0, 71, (2, 23), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="needs the interop extra (transformers)")


def their_model(transformers: Any, name: str) -> Any:
    """A model of transformers' own making, whose norms and biases are random too."""
    kind, fields, _ = CASES[name]
    shape = {} if kind == "Bloom" else SHAPE
    config = getattr(transformers, f"{kind}Config")(**{**shape, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def load(folder: Path) -> MegatronLmDecoder:
    config = read_config(folder)
    model = MegatronLmDecoder(config)
    model.load_state_dict(read_weights(folder, config))
    return model.eval()


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    """Without a cache, so that every way to scale positions is that of the text as it is then."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the largest logit."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_texts_and_the_way_back(transformers: Any, tmp_path: Path, name: str) -> None:
    theirs = their_model(transformers, name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    for field, value in CASES[name][2].items():
        found = getattr(ours.config, field)
        if field == "rotary_scaling":
            value = {key: item for key, item in value.items() if key != "rope_theta"}
        assert found == value, field
    with torch.no_grad():
        assert largest_difference(ours(IDS).logits, theirs(IDS).logits) <= 1e-5
    assert greedy(ours, IDS[:1, :6], 20) == greedy(theirs, IDS[:1, :6], 20)

    write_hugging_face(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    family = json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == family
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tensor], after[tensor]) for tensor in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, theirs(IDS).logits)
    assert read_config(tmp_path / "ours") == ours.config


# bf16 keeps 8 bits of a number, and the two round at different places: of the largest logit.
BF16_BOUND = 0.04


@pytest.mark.parametrize(
    "name", ["mistral", "llama3", "phi3", "gpt_neox", "opt", "bloom", "gemma2", "gemma3"]
)
def test_bf16_within_its_bound(transformers: Any, tmp_path: Path, name: str) -> None:
    theirs = their_model(transformers, name)
    with torch.no_grad():
        exact = theirs(IDS).logits
    theirs = theirs.to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path).to(torch.bfloat16)
    with torch.no_grad():
        assert largest_difference(ours(IDS).logits, theirs(IDS).logits) <= BF16_BOUND
        assert largest_difference(ours(IDS).logits, exact) <= BF16_BOUND


@pytest.mark.parametrize("name", ["gpt_neox", "opt-350m", "bloom-odd", "gemma2", "gemma3", "qwen2_moe"])
def test_gradients_are_those_of_transformers(transformers: Any, tmp_path: Path, name: str) -> None:
    theirs = their_model(transformers, name)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    logits = theirs(IDS[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    loss = ours(IDS[:, :-1], IDS[:, 1:]).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    loss.backward()
    expected.backward()
    tokens = theirs.get_input_embeddings().weight.grad
    difference = (ours.embedding.tokens.weight.grad - tokens).abs().max()
    assert float(difference) <= 1e-5 * float(tokens.abs().max())


def test_positions_far_out_turn_as_in_transformers(transformers: Any) -> None:
    """At position 100,000 a frequency wrong in its last bit shows."""
    from mtnlg.model.positions import rotation_angles

    positions = torch.tensor([[0, 1, 77, 4095, 99_999]])
    for scaling in (None, LLAMA3, YARN | dict(original_max_position_embeddings=4096)):
        rope = scaling or dict(rope_type="default", rope_theta=1e4)
        theirs = transformers.LlamaConfig(
            **{**SHAPE, "max_position_embeddings": 131072}, rope_parameters=dict(rope)
        )
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
        expected = rotary(torch.zeros(1), positions)
        named = None if scaling is None else {k: v for k, v in scaling.items() if k != "rope_theta"}
        ours = MegatronModelConfig(
            hidden_size=36, num_attention_heads=3, position_embedding="rotary", rotary_scaling=named
        )
        for found, wanted in zip(rotation_angles(ours, positions, torch.float32), expected):
            torch.testing.assert_close(found[:, 0], wanted, atol=2e-4, rtol=0)


def test_a_tied_copy_of_the_head_is_passed_over(transformers: Any, tmp_path: Path) -> None:
    their_model(transformers, "gpt_neox-serial").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert load(tmp_path).config.tie_word_embeddings


def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(transformers: Any, tmp_path: Path) -> None:
    their_model(transformers, "phi3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:-3].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name} has the shape \[57, 36\], expected \[60, 36\]"):
        load(tmp_path)


def test_nan_in_the_weights_is_named(transformers: Any, tmp_path: Path) -> None:
    their_model(transformers, "bloom").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.1.mlp.dense_4h_to_h.bias"][5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down.bias holds NaN"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma2", dict(layer_types=["full_attention", "chunked_attention", "full_attention"]), "chunked"),
        ("opt", dict(_remove_final_layer_norm=True), "_remove_final_layer_norm"),
        ("bloom", dict(apply_residual_connection_post_layernorm=True), "post_layernorm"),
        ("phi3", dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "yarn"),
        ("llama3", dict(rope_parameters=dict(rope_type="axial", factor=2.0)), "axial"),
        (
            "llama3",
            dict(rope_parameters=dict(rope_type="llama3", factor=8.0)),
            "high_freq_factor is missing",
        ),
        ("phi3-long", dict(rope_parameters=LONGROPE | dict(long_factor=[1.0])), "long_factor"),
        ("mistral", dict(model_type="mistral3"), "the nearest is mistral"),
        ("gpt_neox", dict(rotary_pct=0.25, rope_parameters=None), "odd number of dimensions"),
        ("llama3", dict(num_key_value_heads=2), "num_key_value_heads is 2"),
    ],
)
def test_what_we_cannot_compute_is_refused(
    transformers: Any, tmp_path: Path, name: str, change: dict[str, Any], message: str
) -> None:
    their_model(transformers, name).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_older_keys_are_understood(tmp_path: Path) -> None:
    """As the files on the hub have them: ``type`` and ``su``, BLOOM's and GPT-NeoX's own names."""
    old: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (
            dict(model_type="bloom", n_embed=32, n_layer=2, num_attention_heads=4, vocab_size=9),
            dict(hidden_size=32, num_attention_heads=4),
        ),
        (
            dict(model_type="gpt_neox", rotary_emb_base=500, rotary_pct=0.5),
            dict(rotary_base=500.0, rotary_percent=0.5),
        ),
        (
            dict(
                model_type="phi3", hidden_size=24, num_attention_heads=2, num_hidden_layers=1,
                max_position_embeddings=64, original_max_position_embeddings=16,
                rope_scaling=dict(type="su", short_factor=SHORT, long_factor=LONG),
            ),
            dict(max_cached_length=16),
        ),
        (
            dict(
                model_type="llama", rope_theta=5e5, max_position_embeddings=131072,
                rope_scaling={key: value for key, value in LLAMA3.items() if key != "rope_theta"},
            ),
            dict(rotary_base=5e5),
        ),
    ]  # fmt: skip
    for saved, fields in old:
        (tmp_path / "config.json").write_text(json.dumps(saved))
        config = read_config(tmp_path)
        for name, value in fields.items():
            assert getattr(config, name) == value, name


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(position_embedding="alibi"), "position_embedding"),
        (dict(norm_placement="around"), "norm_placement"),
        (dict(parallel_residual=True, embedding_norm=True), "embedding_norm"),
    ],
)
def test_a_model_that_no_family_computes_is_refused_by_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"nearest is[^']*\n.*{named}"):
        nearest_architecture(MegatronModelConfig(**fields))
