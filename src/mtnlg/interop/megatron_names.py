"""Megatron's names and orders of rows, and ours.

Megatron keeps queries, keys and values in one matrix, group after group: the queries that share a key
head, then that key head, then its value head. Gate and up projection are one matrix too, the gate first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.config.moe import has_experts
from mtnlg.interop.megatron_experts import FIRSTS, FUSED_NORM, NORM
from mtnlg.interop.megatron_experts import PARTS as _EXPERT_PARTS

_ENDS = {
    "embedding.tokens.weight": "embedding.word_embeddings.weight",
    "embedding.positions.weight": "embedding.position_embeddings.weight",
    "head.norm.weight": "decoder.final_layernorm.weight",
    "head.norm.bias": "decoder.final_layernorm.bias",
    "head.output.weight": "output_layer.weight",
}
_PARTS = {
    "attention_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attention_norm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "attention.output.weight": "self_attention.linear_proj.weight",
    "attention.output.bias": "self_attention.linear_proj.bias",
    "attention.query_norm.weight": "self_attention.q_layernorm.weight",
    "attention.key_norm.weight": "self_attention.k_layernorm.weight",
    "mlp_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp_norm.bias": "mlp.linear_fc1.layer_norm_bias",
    "mlp.down.weight": "mlp.linear_fc2.weight",
    "mlp.down.bias": "mlp.linear_fc2.bias",
    **_EXPERT_PARTS,
}
# Other names of the same: of layers without fused norms, and of Megatron-LM before its core.
ALIASES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "attention.dense.": "self_attention.linear_proj.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}
_QUERY_KEY_VALUE, _FIRST = "self_attention.linear_qkv.{}", "mlp.linear_fc1.{}"


def layer_part(name: str) -> str:
    """Megatron core's name of a part of a layer, for any of its names."""
    for other, usual in ALIASES.items():
        if name.startswith(other):
            return usual + name.removeprefix(other)
    return name


def to_ours(
    theirs: Mapping[str, Tensor], config: MegatronModelConfig
) -> tuple[dict[str, Tensor], set[str]]:
    """Our parameters as views of Megatron's, and which of theirs were used.

    Args:
        theirs: by Megatron core's names, layer by layer (``decoder.layers.0.…``).
        config: the architecture.
    """
    used: set[str] = set()
    ours: dict[str, Tensor] = {}

    def take(name: str) -> Tensor | None:
        used.add(name)
        return theirs.get(name)

    for own, name in _ENDS.items():
        tensor = take(name)
        if tensor is not None:
            is_vocabulary = own in ("embedding.tokens.weight", "head.output.weight")
            ours[own] = tensor[: config.vocab_size] if is_vocabulary else tensor
    if config.tie_word_embeddings:
        ours.pop("head.output.weight", None)
    for index in range(config.num_hidden_layers):
        prefix, layer = f"layers.{index}.", f"decoder.layers.{index}."
        for own, name in _PARTS.items():
            if (tensor := take(layer + name)) is not None:
                ours[prefix + own] = tensor
        for kind in ("weight", "bias"):
            if (fused := take(layer + _QUERY_KEY_VALUE.format(kind))) is not None:
                three = zip(("query", "key", "value"), _split_groups(fused, config))
                ours |= {f"{prefix}attention.{own}.{kind}": part for own, part in three}
            if (first := take(layer + _FIRST.format(kind))) is not None:
                halves = ("gate", "up") if config.is_gated else ("up",)
                cut = zip(halves, first.chunk(len(halves)))
                ours |= {f"{prefix}mlp.{own}.{kind}": part for own, part in cut}
        for names, name in FIRSTS.items():
            if (first := take(layer + name)) is not None:
                wanted = names if config.is_gated else names[1:]
                apart = zip(wanted, first.chunk(len(wanted), dim=-2))
                ours |= {prefix + own: part for own, part in apart}
    return ours, used


def _split_groups(fused: Tensor, config: MegatronModelConfig) -> list[Tensor]:
    size = config.head_size
    queries = config.num_attention_heads // config.key_value_heads * size
    groups = [group.split((queries, size, size)) for group in fused.chunk(config.key_value_heads)]
    return [torch.cat([group[part] for group in groups]) for part in range(3)]


def layers_of_megatron(
    read: Callable[[str], Tensor], config: MegatronModelConfig, names: set[str]
) -> Iterator[tuple[str, int | None, Tensor]]:
    """Megatron's tensors, one after the other: name (without the layer's number), layer, numbers.

    Args:
        read: our parameter by name.
        config: the architecture.
        names: of all parameters of ours.
    """
    for own, name in _ENDS.items():
        if own in names:
            yield name, None, read(own)
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        for own, name in _PARTS.items():
            if prefix + own in names:
                is_apart = has_experts(config, index)  # no matrix follows with which the norm is fused
                name = name.replace(FUSED_NORM, NORM) if is_apart else name
                yield f"decoder.layers.{name}", index, read(prefix + own)
        for both, name in FIRSTS.items():
            if prefix + both[1] in names:
                parts = [read(prefix + part) for part in both if prefix + part in names]
                yield f"decoder.layers.{name}", index, torch.cat(parts, dim=-2)
        for kind in ("weight", "bias"):
            if f"{prefix}attention.query.{kind}" in names:
                parts = [read(f"{prefix}attention.{part}.{kind}") for part in ("query", "key", "value")]
                grouped = [part.unflatten(0, (config.key_value_heads, -1)) for part in parts]
                fused = torch.cat(grouped, dim=1).flatten(0, 1)
                yield f"decoder.layers.{_QUERY_KEY_VALUE.format(kind)}", index, fused
            if f"{prefix}mlp.up.{kind}" in names:
                halves = [f"{prefix}mlp.{part}.{kind}" for part in ("gate", "up")]
                first = torch.cat([read(part) for part in halves if part in names])
                yield f"decoder.layers.{_FIRST.format(kind)}", index, first
