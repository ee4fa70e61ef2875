"""Which tensor of each Hugging Face family of decoders holds which parameter of ours: one table each.

``{layer}`` and ``{expert}`` stand for their numbers, ``.*`` at the end for ``.weight`` and ``.bias``. Lines
about parameters that a model does not have (biases, experts, a head of its own) say nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from mtnlg.config import MegatronModelConfig
from mtnlg.interop.rule import Rule
from mtnlg.model import LanguageModel, MegatronEncoderDecoder, MegatronLmDecoder, NoInitialization


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Args:
        theirs: name of a tensor in the family.
        ours: our parameters, which theirs holds one after the other along the output axis.
        is_transposed: matrices are [in, out] (GPT-2's ``Conv1D``) where ours are [out, in].
        by_head: theirs holds query, key and value of the first head, then those of the second.
    """

    theirs: str
    ours: tuple[str, ...]
    is_transposed: bool = False
    by_head: bool = False


def _lines(
    theirs: str, ours: str, names: Mapping[str, str], is_transposed: bool = False
) -> tuple[Line, ...]:
    return tuple(
        Line(f"{theirs}{name}.*", (f"{ours}{own}.*",), is_transposed) for name, own in names.items()
    )


def _query_key_value(ours: str) -> tuple[str, ...]:
    return tuple(f"{ours}{name}.*" for name in ("query", "key", "value"))


_LAYER = "layers.{layer}."
_ATTENTION, _MLP = f"{_LAYER}attention.", f"{_LAYER}mlp."
_HEAD = Line("lm_head.weight", ("head.output.weight",))
_LLAMA_EMBEDDING = Line("model.embed_tokens.weight", ("embedding.tokens.weight",))
_LLAMA_ENDS = (Line("model.norm.*", ("head.norm.*",)), _HEAD)
_LLAMA_LAYER = "model.layers.{layer}."
_LLAMA_NORMS = _lines(
    _LLAMA_LAYER, _LAYER, {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
)
_GEMMA_NORMS = _lines(
    _LLAMA_LAYER,
    _LAYER,
    {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_output_norm",
    },
)
_LLAMA_ATTENTION = _lines(
    f"{_LLAMA_LAYER}self_attn.",
    _ATTENTION,
    {
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "q_norm": "query_norm",
        "k_norm": "key_norm",
    },
)
_GATED = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
_LLAMA_MLP = _lines(f"{_LLAMA_LAYER}mlp.", _MLP, _GATED)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Line, ...]:
    """In files each expert has its own matrices; of ours one parameter holds those of all."""
    theirs = f"{_LLAMA_LAYER}{block}."
    names = {gate: "gate", up: "up", down: "down"}
    return (
        Line(f"{theirs}gate.weight", (f"{_MLP}router.weight",)),
        Line(f"{theirs}gate.e_score_correction_bias", (f"{_MLP}router.selection_bias",)),
        *(
            Line(f"{theirs}experts.{{expert}}.{name}.weight", (f"{_MLP}experts.{own}",))
            for name, own in names.items()
        ),
    )


_LLAMA = (_LLAMA_EMBEDDING, *_LLAMA_NORMS, *_LLAMA_ATTENTION, *_LLAMA_MLP, *_LLAMA_ENDS)
_QWEN_MOE = (
    _LLAMA_EMBEDDING,
    *_LLAMA_NORMS,
    *_LLAMA_ATTENTION,
    *_LLAMA_MLP,
    *_experts("mlp", *_GATED),
    *_lines(f"{_LLAMA_LAYER}mlp.shared_expert.", f"{_MLP}shared.", _GATED),
    Line(f"{_LLAMA_LAYER}mlp.shared_expert_gate.weight", (f"{_MLP}shared_gate.weight",)),
    *_LLAMA_ENDS,
)
_GLM_MOE = (
    _LLAMA_EMBEDDING,
    *_LLAMA_NORMS,
    *_LLAMA_ATTENTION,
    *_LLAMA_MLP,
    *_experts("mlp", *_GATED),
    *_lines(f"{_LLAMA_LAYER}mlp.shared_experts.", f"{_MLP}shared.", _GATED),
    *_LLAMA_ENDS,
)
_MIXTRAL = (
    _LLAMA_EMBEDDING,
    *_LLAMA_NORMS,
    *_LLAMA_ATTENTION,
    *_experts("block_sparse_moe", "w1", "w3", "w2"),
    *_LLAMA_ENDS,
)
_PHI3 = (
    _LLAMA_EMBEDDING,
    *_LLAMA_NORMS,
    Line(f"{_LLAMA_LAYER}self_attn.qkv_proj.*", _query_key_value(_ATTENTION)),
    Line(f"{_LLAMA_LAYER}self_attn.o_proj.*", (f"{_ATTENTION}output.*",)),
    Line(f"{_LLAMA_LAYER}mlp.gate_up_proj.*", (f"{_MLP}gate.*", f"{_MLP}up.*")),
    Line(f"{_LLAMA_LAYER}mlp.down_proj.*", (f"{_MLP}down.*",)),
    *_LLAMA_ENDS,
)
_GEMMA2 = (_LLAMA_EMBEDDING, *_GEMMA_NORMS, *_LLAMA_ATTENTION, *_LLAMA_MLP, *_LLAMA_ENDS)
_GPT2_LAYER = "transformer.h.{layer}."
_GPT2 = (
    Line("transformer.wte.weight", ("embedding.tokens.weight",)),
    Line("transformer.wpe.weight", ("embedding.positions.weight",)),
    *_lines(_GPT2_LAYER, _LAYER, {"ln_1": "attention_norm", "ln_2": "mlp_norm"}),
    Line(f"{_GPT2_LAYER}attn.c_attn.*", _query_key_value(_ATTENTION), is_transposed=True),
    *_lines(f"{_GPT2_LAYER}attn.", _ATTENTION, {"c_proj": "output"}, is_transposed=True),
    *_lines(f"{_GPT2_LAYER}mlp.", _MLP, {"c_fc": "up", "c_proj": "down"}, is_transposed=True),
    Line("transformer.ln_f.*", ("head.norm.*",)),
    _HEAD,
)
_MEGATRON_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
_MEGATRON_MLP = {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}
_NEOX_LAYER = "gpt_neox.layers.{layer}."
_GPT_NEOX = (
    Line("gpt_neox.embed_in.weight", ("embedding.tokens.weight",)),
    *_lines(_NEOX_LAYER, _LAYER, _MEGATRON_NORMS),
    Line(f"{_NEOX_LAYER}attention.query_key_value.*", _query_key_value(_ATTENTION), by_head=True),
    *_lines(f"{_NEOX_LAYER}attention.", _ATTENTION, {"dense": "output"}),
    *_lines(f"{_NEOX_LAYER}mlp.", _MLP, _MEGATRON_MLP),
    Line("gpt_neox.final_layer_norm.*", ("head.norm.*",)),
    Line("embed_out.weight", ("head.output.weight",)),
)
_BLOOM_LAYER = "transformer.h.{layer}."
_BLOOM = (
    Line("transformer.word_embeddings.weight", ("embedding.tokens.weight",)),
    Line("transformer.word_embeddings_layernorm.*", ("embedding.norm.*",)),
    *_lines(_BLOOM_LAYER, _LAYER, _MEGATRON_NORMS),
    Line(f"{_BLOOM_LAYER}self_attention.query_key_value.*", _query_key_value(_ATTENTION), by_head=True),
    *_lines(f"{_BLOOM_LAYER}self_attention.", _ATTENTION, {"dense": "output"}),
    *_lines(f"{_BLOOM_LAYER}mlp.", _MLP, _MEGATRON_MLP),
    Line("transformer.ln_f.*", ("head.norm.*",)),
    _HEAD,
)
_OPT_LAYER = "model.decoder.layers.{layer}."
_OPT = (
    Line("model.decoder.embed_tokens.weight", ("embedding.tokens.weight",)),
    Line("model.decoder.embed_positions.weight", ("embedding.positions.weight",)),
    Line("model.decoder.project_in.weight", ("embedding.projection.weight",)),
    *_lines(_OPT_LAYER, _LAYER, {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "mlp_norm"}),
    *_lines(
        f"{_OPT_LAYER}self_attn.",
        _ATTENTION,
        {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"},
    ),
    *_lines(_OPT_LAYER, _MLP, {"fc1": "up", "fc2": "down"}),
    Line("model.decoder.final_layer_norm.*", ("head.norm.*",)),
    Line("model.decoder.project_out.weight", ("head.projection.weight",)),
    _HEAD,
)
NAMES: dict[str, tuple[Line, ...]] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "bloom": _BLOOM,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA2),
    "phi3": _PHI3,
    "mixtral": _MIXTRAL,
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), _QWEN_MOE),
    "glm4_moe": _GLM_MOE,
}


def decoder_rules(model_type: str, config: MegatronModelConfig) -> list[Rule]:
    """Every tensor of a family of decoders for this config, in the order of the model."""
    shapes = parameter_shapes(config)
    rules: list[Rule] = []
    for in_layers, group in groupby(NAMES[model_type], key=lambda line: "{layer}" in line.theirs):
        lines = list(group)
        for layer in range(config.num_hidden_layers if in_layers else 1):
            for line in lines:
                rules += _rules_of_line(line, layer, shapes, config.num_attention_heads)
    return rules


def parameter_shapes(config: MegatronModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the plain model of ``config``, a tied head left out."""
    with torch.device("meta"), NoInitialization():
        kind = MegatronEncoderDecoder if config.has_encoder else MegatronLmDecoder
        decoder: LanguageModel = kind(config)
    tensors = (*decoder.named_parameters(), *decoder.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _rules_of_line(
    line: Line, layer: int, shapes: Mapping[str, Sequence[int]], num_heads: int
) -> Iterator[Rule]:
    for kind in ("weight", "bias") if line.theirs.endswith(".*") else ("",):
        theirs = line.theirs.replace("{layer}", str(layer)).replace(".*", f".{kind}")
        ours = tuple(name.replace("{layer}", str(layer)).replace(".*", f".{kind}") for name in line.ours)
        if any(name not in shapes for name in ours):
            continue
        sizes = tuple(shapes[name][0] for name in ours)
        shape = (sum(sizes), *shapes[ours[0]][1:])
        is_transposed = line.is_transposed and len(shape) == 2
        heads = num_heads if line.by_head else None
        if "{expert}" not in theirs:
            yield Rule(
                theirs, ours, is_transposed, None, sizes, heads, shape[:: -1 if is_transposed else 1]
            )
            continue
        for expert in range(sizes[0]):
            name = theirs.replace("{expert}", str(expert))
            yield Rule(name, ours, expert=expert, sizes=sizes, shape=shape[1:])
