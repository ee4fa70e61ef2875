"""Hugging Face's encoder-decoder families: T5 (v1.0, v1.1, UL2), mT5 and UMT5.

They differ in what stands before the head: T5 scales unless ``tie_word_embeddings`` is false, mT5 never
does, UMT5 always (transformers 5). Whether the head is a matrix of its own is seen in the files alone, for
transformers 5 writes ``tie_word_embeddings: true`` in any case.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop.architecture import Architecture

if TYPE_CHECKING:
    from mtnlg.interop.tensor_folder import TensorFolder

_FIELDS = dict(
    vocab_size="vocab_size",
    hidden_size="d_model",
    num_hidden_layers="num_layers",
    num_decoder_layers="num_decoder_layers",
    num_attention_heads="num_heads",
    head_dim="d_kv",
    intermediate_size="d_ff",
    relative_attention_num_buckets="relative_attention_num_buckets",
    relative_attention_max_distance="relative_attention_max_distance",
    layernorm_eps="layer_norm_epsilon",
    hidden_dropout="dropout_rate",
    use_cache="use_cache",
    pad_token_id="pad_token_id",
)
_DEFAULTS: dict[str, Any] = dict(
    vocab_size=32128, d_model=512, num_layers=6, num_decoder_layers=None, num_heads=8, d_kv=64, d_ff=2048,
    relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
    dropout_rate=0.1, use_cache=True, pad_token_id=0, eos_token_id=1, feed_forward_proj="relu",
)  # fmt: skip
_MT5_DEFAULTS = _DEFAULTS | dict(
    vocab_size=250112, d_ff=1024, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu"
)
ENCODER_DECODER_FAMILIES = {
    family.model_type: family
    for family in (
        Architecture("t5", "T5ForConditionalGeneration", _FIELDS, _DEFAULTS, {}),
        Architecture("mt5", "MT5ForConditionalGeneration", _FIELDS, _MT5_DEFAULTS, {}),
        Architecture("umt5", "UMT5ForConditionalGeneration", _FIELDS, _MT5_DEFAULTS, {}),
    )
}
# "gated-gelu" is the tanh form in all of them; the exact form has no name with a gate.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
    "gated-relu": "reglu",
}
# Positions have no end; this bounds the memory of a request.
_MAX_LENGTH = 4096
HAS_OWN_HEAD = "has_own_head"  # in no file; found out of the tensors
HEAD_NAME, EMBEDDING_NAME = "lm_head.weight", "shared.weight"
# Copies that old files hold, and a matrix that no release ever used.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = ".EncDecAttention.relative_attention_bias.weight"


def has_own_head(saved: dict[str, Any], tensors: TensorFolder) -> bool:
    """Whether the head in the files is a matrix of its own and no copy of the embedding."""
    if HEAD_NAME not in tensors.names:
        return False
    if saved.get("tie_word_embeddings") is False:
        return True
    embedding = next((name for name in (EMBEDDING_NAME, *COPIES) if name in tensors.names), None)
    return embedding is None or not torch.equal(tensors.read(HEAD_NAME), tensors.read(embedding))


def encoder_decoder_from_saved(
    saved: dict[str, Any], where: str, own: dict[str, Any] | None = None
) -> MegatronModelConfig:
    """Our config for a parsed ``config.json``.

    Args:
        saved: the parsed file; ``HAS_OWN_HEAD`` in it is what :func:`has_own_head` says, and without it
            ``tie_word_embeddings`` is gone by.
        where: its path, for messages.
        own: our own saved fields, which say more where they agree with the family's keys.

    Raises:
        CheckpointError: an activation is not ours to compute.
    """
    found = MegatronModelConfig(**_fields_from_saved(saved, where, saved.get(HAS_OWN_HEAD)))
    if own is None:
        return found
    names = {field.name for field in fields(MegatronModelConfig)}
    before = MegatronModelConfig(**{name: value for name, value in own.items() if name in names})
    written = encoder_decoder_to_saved(before)
    agrees = before.tie_word_embeddings == found.tie_word_embeddings
    return before if agrees and all(saved.get(key) == written[key] for key in written) else found


def _fields_from_saved(saved: dict[str, Any], where: str, own_head: bool | None) -> dict[str, Any]:
    """Fields of our config for a parsed ``config.json``.

    Args:
        saved: the parsed file.
        where: its path, for messages.
        own_head: what :func:`has_own_head` says; ``None`` goes by ``tie_word_embeddings``.

    Raises:
        CheckpointError: an activation is not ours to compute.
    """
    model_type = saved["model_type"]
    family = ENCODER_DECODER_FAMILIES[model_type]
    values = {**family.defaults, **{key: value for key, value in saved.items() if value is not None}}
    activation = values["feed_forward_proj"]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(
            f"{where}: feed_forward_proj {activation!r} is unknown: one of {', '.join(_ACTIVATIONS)} is."
        )
    is_tied = saved.get("tie_word_embeddings") is not False
    scales = {"t5": values.get("scale_decoder_outputs", is_tied), "mt5": False, "umt5": is_tied}[model_type]
    tied = is_tied if own_head is None else not own_head
    end = values["eos_token_id"]
    return {
        **{name: values[key] for name, key in family.fields.items()},
        "architecture": "encoder_decoder",
        "position_embedding": "relative",
        "normalization": "rmsnorm",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _MAX_LENGTH,
        "attention_dropout": values["dropout_rate"],
        "activation_function": _ACTIVATIONS[activation],
        "relative_attention_per_layer": model_type == "umt5",
        "tie_word_embeddings": tied,
        "scale_output": None if scales == tied else scales,
        "decoder_start_token_id": values.get("decoder_start_token_id", values["pad_token_id"]),
        "eos_token_id": end[0] if isinstance(end, list) else end,
    }


def nearest_encoder_decoder(config: MegatronModelConfig) -> Architecture:
    """The family that computes exactly what ``config`` describes.

    Raises:
        ConfigError: there is none; every field in the way is named.
    """
    required: dict[str, Any] = dict(
        normalization="rmsnorm", attention_bias=False, attention_output_bias=False, mlp_bias=False,
        num_key_value_heads=config.num_attention_heads,
    )  # fmt: skip
    effective = {
        "attention_output_bias": config.has_attention_output_bias,
        "num_key_value_heads": config.key_value_heads,
    }
    problems = [
        f"{name} is {found!r}: it must be {value!r}."
        for name, value in required.items()
        if (found := effective.get(name, getattr(config, name))) != value
    ]
    if config.activation_function not in _ACTIVATIONS.values():
        known = ", ".join(dict.fromkeys(_ACTIVATIONS.values()))
        problems.append(
            f"activation_function is {config.activation_function!r}: it must be one of {known}."
        )
    if config.relative_attention_per_layer and not config.scales_output:
        problems.append("relative_attention_per_layer is True: then scale_output must be, too.")
    if problems:
        said = "no Hugging Face architecture computes this model; the nearest is t5, but:"
        raise ConfigError([said] + [f"  {problem}" for problem in problems])
    if config.relative_attention_per_layer:
        return ENCODER_DECODER_FAMILIES["umt5"]
    is_mt5 = config.tie_word_embeddings and not config.scales_output
    return ENCODER_DECODER_FAMILIES["mt5" if is_mt5 else "t5"]


def encoder_decoder_to_saved(config: MegatronModelConfig) -> dict[str, Any]:
    """The keys of ``config.json``.

    Raises:
        ConfigError: no architecture fits, and why.
    """
    family = nearest_encoder_decoder(config)
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    values = {
        **config.to_dict(),
        "num_decoder_layers": config.decoder_layers,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn_size,
    }
    written = {key: values[name] for name, key in family.fields.items()}
    written |= dict(
        is_encoder_decoder=True,
        feed_forward_proj=names[config.activation_function],
        tie_word_embeddings=config.tie_word_embeddings or config.scales_output,
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
    )
    if family.model_type == "t5":
        written["scale_decoder_outputs"] = config.scales_output
    return written


def special_ids(config: MegatronModelConfig) -> dict[str, int]:
    """The tokens that generation goes by, as ``generation_config.json`` has them."""
    return dict(
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def encoder_decoder_names(config: MegatronModelConfig) -> dict[str, str]:
    """Their tensor → our parameter, in the order of the model."""
    names = {EMBEDDING_NAME: "embedding.tokens.weight"}
    for index in range(config.total_layers):
        names |= _layer_names(index, config)
    names["encoder.final_layer_norm.weight"] = "encoder_end.norm.weight"
    names["decoder.final_layer_norm.weight"] = "head.norm.weight"
    if not config.tie_word_embeddings:
        names[HEAD_NAME] = "head.output.weight"
    return names


def _layer_names(index: int, config: MegatronModelConfig) -> dict[str, str]:
    in_decoder = index >= config.num_hidden_layers
    number = index - config.num_hidden_layers if in_decoder else index
    side, ours = "decoder" if in_decoder else "encoder", f"layers.{index}."
    block, mlp = f"{side}.block.{number}.layer.", 2 if in_decoder else 1
    gate = {"wi_0": "gate", "wi_1": "up"} if config.is_gated else {"wi": "up"}
    pairs = {f"{block}0.SelfAttention.{letter}": f"{ours}attention.{name}" for letter, name in _MATRICES}
    if config.relative_attention_per_layer:
        pairs[f"{block}0.SelfAttention.relative_attention_bias"] = f"{ours}positions.buckets"
    elif number == 0:
        pairs[f"{block}0.SelfAttention.relative_attention_bias"] = f"{side}_positions.buckets"
    pairs[f"{block}0.layer_norm"] = f"{ours}attention_norm"
    if in_decoder:
        for letter, name in _MATRICES:
            pairs[f"{block}1.EncDecAttention.{letter}"] = f"{ours}cross_attention.{name}"
        pairs[f"{block}1.layer_norm"] = f"{ours}cross_norm"
    for theirs, name in (gate | {"wo": "down"}).items():
        pairs[f"{block}{mlp}.DenseReluDense.{theirs}"] = f"{ours}mlp.{name}"
    pairs[f"{block}{mlp}.layer_norm"] = f"{ours}mlp_norm"
    return {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in pairs.items()}


_MATRICES = (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
