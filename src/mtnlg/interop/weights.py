"""Which tensor of a Hugging Face family holds which parameter of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.tensor_folder import TensorFolder

HEAD = "head.output.weight"
EMBEDDING = "embedding.tokens.weight"
# Buffers of old releases that hold no weights.
_IGNORED_ENDINGS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Rule:
    """One tensor of theirs is one or more of ours.

    Args:
        theirs: its name in the family.
        ours: our parameters, which theirs holds one after the other along the output axis.
        is_transposed: theirs is [in, out] (GPT-2's ``Conv1D``) where ours is [out, in].
    """

    theirs: str
    ours: tuple[str, ...]
    is_transposed: bool = False

    def to_theirs(self, tensors: list[Tensor]) -> Tensor:
        """Ours → theirs."""
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined.t() if self.is_transposed else joined

    def to_ours(self, tensor: Tensor) -> list[Tensor]:
        """Theirs → ours."""
        tensor = tensor.t() if self.is_transposed else tensor
        return [part.contiguous() for part in tensor.chunk(len(self.ours))]


def rules(model_type: str, config: MegatronModelConfig) -> list[Rule]:
    """Every tensor of the family for this config, in the order of the model."""
    layer_rules = _gpt2_layer if model_type == "gpt2" else _llama_layer
    is_gpt2 = model_type == "gpt2"
    result = [Rule("transformer.wte.weight" if is_gpt2 else "model.embed_tokens.weight", (EMBEDDING,))]
    if is_gpt2:
        result.append(Rule("transformer.wpe.weight", ("embedding.positions.weight",)))
    for index in range(config.num_hidden_layers):
        result += layer_rules(index, config)
    if is_gpt2:
        result += [Rule(f"transformer.ln_f.{kind}", (f"head.norm.{kind}",)) for kind in ("weight", "bias")]
    else:
        result.append(Rule("model.norm.weight", ("head.norm.weight",)))
    if not config.tie_word_embeddings:
        result.append(Rule("lm_head.weight", (HEAD,)))
    return result


def _gpt2_layer(index: int, config: MegatronModelConfig) -> list[Rule]:
    theirs, ours = f"transformer.h.{index}.", f"layers.{index}."
    result = []
    for kind in ("weight", "bias"):
        transposed = kind == "weight"
        fused = tuple(f"{ours}attention.{name}.{kind}" for name in ("query", "key", "value"))
        result += [
            Rule(f"{theirs}ln_1.{kind}", (f"{ours}attention_norm.{kind}",)),
            Rule(f"{theirs}attn.c_attn.{kind}", fused, transposed),
            Rule(f"{theirs}attn.c_proj.{kind}", (f"{ours}attention.output.{kind}",), transposed),
            Rule(f"{theirs}ln_2.{kind}", (f"{ours}mlp_norm.{kind}",)),
            Rule(f"{theirs}mlp.c_fc.{kind}", (f"{ours}mlp.up.{kind}",), transposed),
            Rule(f"{theirs}mlp.c_proj.{kind}", (f"{ours}mlp.down.{kind}",), transposed),
        ]
    return result


def _llama_layer(index: int, config: MegatronModelConfig) -> list[Rule]:
    names = {
        "input_layernorm.weight": "attention_norm.weight",
        "self_attn.q_proj.weight": "attention.query.weight",
        "self_attn.k_proj.weight": "attention.key.weight",
        "self_attn.v_proj.weight": "attention.value.weight",
        "self_attn.o_proj.weight": "attention.output.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
        "mlp.gate_proj.weight": "mlp.gate.weight",
        "mlp.up_proj.weight": "mlp.up.weight",
        "mlp.down_proj.weight": "mlp.down.weight",
    }
    biased = [
        *(("q_proj", "k_proj", "v_proj") if config.attention_bias else ()),
        *(("o_proj",) if config.has_attention_output_bias else ()),
        *(("gate_proj", "up_proj", "down_proj") if config.mlp_bias else ()),
    ]
    for theirs, ours in list(names.items()):
        if any(f".{name}." in theirs for name in biased):
            names[theirs.replace(".weight", ".bias")] = ours.replace(".weight", ".bias")
    if config.qk_normalization:
        names["self_attn.q_norm.weight"] = "attention.query_norm.weight"
        names["self_attn.k_norm.weight"] = "attention.key_norm.weight"
    return [
        Rule(f"model.layers.{index}.{theirs}", (f"layers.{index}.{ours}",))
        for theirs, ours in names.items()
    ]


def export_tensors(
    model_type: str, config: MegatronModelConfig, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, one at a time.

    Args:
        model_type: the family.
        config: the architecture.
        read: our parameter by name.
    """
    for rule in rules(model_type, config):
        yield rule.theirs, rule.to_theirs([read(name) for name in rule.ours])


def import_tensors(
    model_type: str, config: MegatronModelConfig, source: TensorFolder, where: str
) -> dict[str, Tensor]:
    """Our parameters by name, from a family's files.

    Raises:
        CheckpointError: tensors are missing or left over; all are named.
    """
    wanted = {rule: _find(rule.theirs, source) for rule in rules(model_type, config)}
    missing = [rule.theirs for rule, name in wanted.items() if name is None]
    found = {name for name in wanted.values() if name is not None}
    extra = sorted(name for name in source.names - found if not _may_be_left_over(name, config))
    if missing or extra:
        problems = [f"tensor {name} is missing" for name in missing]
        problems += [f"tensor {name} belongs to no parameter" for name in extra]
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{where}: the weights do not fit config.json: {shown}.")
    state: dict[str, Tensor] = {}
    for rule, name in wanted.items():
        if name is not None:
            state.update(zip(rule.ours, rule.to_ours(source.read(name))))
    return state


def _find(name: str, source: TensorFolder) -> str | None:
    """The name as it is, or without the family's prefix, as files of the bare model have it."""
    bare = name.split(".", 1)[1]
    return next((candidate for candidate in (name, bare) if candidate in source.names), None)


def _may_be_left_over(name: str, config: MegatronModelConfig) -> bool:
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith(_IGNORED_ENDINGS)
