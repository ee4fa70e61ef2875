"""Our config as a Hugging Face ``config.json`` and back."""

from __future__ import annotations

import difflib
from dataclasses import MISSING, fields
from typing import Any

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.interop.architecture import Architecture
from mtnlg.interop.decoder_families import DECODER_FAMILIES
from mtnlg.interop.encoder_decoder_families import (
    ENCODER_DECODER_FAMILIES,
    encoder_decoder_from_saved,
    encoder_decoder_to_saved,
    nearest_encoder_decoder,
)
from mtnlg.interop.moe_families import MOE_FAMILIES

OWN_KEY = "mtnlg"  # our whole config rides along in config.json, for what the family cannot say
ARCHITECTURES = DECODER_FAMILIES | MOE_FAMILIES | ENCODER_DECODER_FAMILIES
# What a family that does not speak of it has as we have it by default.
_SAME_UNLESS_SAID = (
    "position_embedding",
    "normalization",
    "position_offset",
    "rotary_percent",
    "rotary_scaling",
    "rotary_local_base",
    "norm_placement",
    "parallel_residual",
    "embedding_norm",
    "embedding_scale",
    "embedding_size",
    "logit_softcap",
    "attention_softcap",
    "attention_scalar",
    "sliding_window",
    "full_attention_layers",
    "qk_normalization",
    "num_key_value_heads",
    "head_dim",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "num_dense_layers_first",
    "moe_layer_interval",
    "router_score_function",
    "router_scaling_factor",
)
_DEFAULTS = {item.name: item.default for item in fields(MegatronModelConfig) if item.default is not MISSING}


def nearest_architecture(config: MegatronModelConfig) -> Architecture:
    """The family that computes exactly what ``config`` describes.

    Raises:
        ConfigError: there is none; each field in the way of the nearest one is named.
    """
    if config.architecture == "encoder_decoder":
        return nearest_encoder_decoder(config)
    families = DECODER_FAMILIES if config.num_experts is None else MOE_FAMILIES
    if config.exported_as is not None and config.exported_as not in families:
        raise ConfigError(f"exported_as is {config.exported_as!r}: choose one of {', '.join(families)}.")
    problems = {name: _obstacles(family, config) for name, family in families.items()}
    best = min(problems, key=lambda name: (len(problems[name]), name != config.exported_as))
    if problems[best]:
        raise ConfigError(
            [f"no Hugging Face architecture computes this model; the nearest is {best}, but:"]
            + [f"  {problem}" for problem in problems[best]]
        )
    return families[best]


def _obstacles(family: Architecture, config: MegatronModelConfig) -> list[str]:
    """Every field of ``config`` that ``family`` cannot express."""
    effective = _effective(config)
    unsaid = [name for name in _SAME_UNLESS_SAID if name not in family.expressed]
    required = {name: _DEFAULTS[name] for name in unsaid} | _fixed(family, effective["attention_bias"])
    problems = [
        f"{name} is {effective[name]!r}: it must be {value!r}."
        for name, value in required.items()
        if effective[name] != value
    ]
    return problems + [problem for setting in family.settings for problem in setting.obstacles(config)]


def _effective(config: MegatronModelConfig) -> dict[str, Any]:
    """The fields, those that say no more than the default as the default says it."""
    said = config.to_dict() | dict(attention_output_bias=config.has_attention_output_bias)
    defaults = dict(
        num_key_value_heads=config.key_value_heads == config.num_attention_heads,
        head_dim=config.head_size * config.num_attention_heads == config.hidden_size,
        intermediate_size=config.ffn_size == 4 * config.hidden_size,
        embedding_size=config.embedding_width == config.hidden_size,
        attention_scalar=config.attention_scalar in (None, config.head_size),
        shared_expert_intermediate_size=(
            config.shared_expert_size == config.num_shared_experts * config.expert_ffn_size
        ),
        rotary_percent=config.position_embedding != "rotary",
    )
    return said | {name: _DEFAULTS[name] for name, is_default in defaults.items() if is_default}


def _fixed(family: Architecture, attention_bias: bool) -> dict[str, Any]:
    fixed = dict(family.fixed)
    if fixed.get("attention_output_bias", True) is None:  # there is one where the others are
        fixed["attention_output_bias"] = attention_bias
    return fixed


def to_hugging_face(config: MegatronModelConfig) -> dict[str, Any]:
    """The ``config.json`` of the nearest architecture.

    Raises:
        ConfigError: no architecture fits, and why.
    """
    family = nearest_architecture(config)
    if config.architecture == "encoder_decoder":
        return _with_names(family, encoder_decoder_to_saved(config), config)
    values = {**config.to_dict(), **_derived(config)}
    written = {key: values[name] for name, key in family.fields.items()}
    for setting in family.settings:
        written |= setting.write(config)
    return _with_names(family, written, config)


def _with_names(
    family: Architecture, written: dict[str, Any], config: MegatronModelConfig
) -> dict[str, Any]:
    names = dict(model_type=family.model_type, architectures=[family.class_name])
    return {**names, **written, OWN_KEY: config.to_dict()}


def _derived(config: MegatronModelConfig) -> dict[str, Any]:
    scalar = config.attention_scalar or config.head_size
    return dict(
        intermediate_size=config.ffn_size,
        num_key_value_heads=config.key_value_heads,
        head_dim=config.head_size,
        init_method_std=config.init_std,
        moe_intermediate_size=config.expert_ffn_size,
        router_aux_loss_coefficient=config.aux_loss_coefficient,
        shared_expert_intermediate_size=config.shared_expert_size,
        embedding_size=config.embedding_width,
        attention_scalar=int(scalar) if scalar == int(scalar) else scalar,
    )


def from_hugging_face(saved: dict[str, Any], where: str) -> MegatronModelConfig:
    """Our config for a parsed ``config.json``.

    Args:
        saved: the parsed file.
        where: its path, for messages.

    Raises:
        CheckpointError: the architecture or one of its settings is not ours to compute.
    """
    model_type = saved.get("model_type", "")
    family = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        near = difflib.get_close_matches(str(model_type), ARCHITECTURES, n=2, cutoff=0.5)
        hint = f"; the nearest is {' or '.join(near)}" if near else ""
        raise CheckpointError(
            f"{where}: model_type is {model_type!r}: only {', '.join(ARCHITECTURES)} can be read{hint}."
        )
    _refuse_unsupported(family, saved, where)
    if family.model_type in ENCODER_DECODER_FAMILIES:
        return encoder_decoder_from_saved(saved, where, saved.get(OWN_KEY))
    renamed = {key: saved[alias] for alias, key in family.aliases.items() if alias in saved}
    values = {**family.defaults, **saved, **renamed}
    known = {name: values[key] for name, key in family.fields.items()}
    known |= _fixed(family, known.get("attention_bias", family.fixed.get("attention_bias", False)))
    for setting in family.settings:
        known |= setting.read({**values, **_layers(known)}, where)
    config = _config(family, saved.get(OWN_KEY), known, where)
    turned = int(config.head_size * config.rotary_percent)
    if config.position_embedding == "rotary" and turned % 2:
        raise CheckpointError(
            f"{where}: an odd number of dimensions is rotated ({turned}): that cannot be."
        )
    return config


def _layers(known: dict[str, Any]) -> dict[str, Any]:
    return {name: known[name] for name in ("num_hidden_layers", "hidden_size", "max_position_embeddings")}


def _config(
    family: Architecture, own: dict[str, Any] | None, known: dict[str, Any], where: str
) -> MegatronModelConfig:
    """Our own saved fields where they agree with the family's keys; the family's keys win."""
    try:
        if not isinstance(own, dict):
            return MegatronModelConfig(**known, exported_as=family.model_type)
        own = {name: value for name, value in own.items() if name in _DEFAULTS}
        before = MegatronModelConfig(**own)
        derived = {**before.to_dict(), **_derived(before)}
        derived["attention_output_bias"] = before.has_attention_output_bias
        changed = {name: value for name, value in known.items() if derived[name] != value}
        return MegatronModelConfig(**{**own, **changed})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except TypeError as error:
        raise CheckpointError(f"{where}: a value is of the wrong type ({error}).") from None


def _refuse_unsupported(family: Architecture, saved: dict[str, Any], where: str) -> None:
    problems = [
        f"{key} is {saved[key]!r}: only {', '.join(map(repr, allowed))} can be computed."
        for key, allowed in family.unsupported.items()
        if key in saved and saved[key] not in allowed
    ]
    if saved.get("quantization_config"):
        problems.append("quantization_config is given: only unquantized weights can be read.")
    if problems:
        raise CheckpointError("\n".join(f"{where}: {problem}" for problem in problems))
