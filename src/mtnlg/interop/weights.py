"""Which tensor of a Hugging Face family holds which parameter of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.config.moe import has_experts
from mtnlg.interop.moe_families import MOE_FAMILIES, expert_matrices, moe_prefix
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
        expert: theirs is this one's matrix of our parameter, which holds those of all experts.
    """

    theirs: str
    ours: tuple[str, ...]
    is_transposed: bool = False
    expert: int | None = None

    def to_theirs(self, tensors: list[Tensor]) -> Tensor:
        """Ours → theirs."""
        if self.expert is not None:
            return tensors[0][self.expert]
        joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return joined.t() if self.is_transposed else joined

    def to_ours(self, tensor: Tensor) -> list[Tensor]:
        """Theirs → ours."""
        tensor = tensor.t() if self.is_transposed else tensor
        return [part.contiguous() for part in tensor.chunk(len(self.ours))]


def rules(model_type: str, config: MegatronModelConfig) -> list[Rule]:
    """Every tensor of the family for this config, in the order of the model."""
    layer_rules = _gpt2_layer if model_type == "gpt2" else _llama_layer
    if model_type in MOE_FAMILIES:
        layer_rules = partial(_moe_layer, model_type)
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
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "mlp_norm",
    }
    if config.qk_normalization:
        names |= {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
    if not has_experts(config, index):
        names |= {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
    biased = [
        *(("q_proj", "k_proj", "v_proj") if config.attention_bias else ()),
        *(("o_proj",) if config.has_attention_output_bias else ()),
        *(("gate_proj", "up_proj", "down_proj") if config.mlp_bias else ()),
    ]
    result = []
    for theirs, ours in names.items():
        kinds = ("weight", "bias") if theirs.split(".")[-1] in biased else ("weight",)
        for kind in kinds:
            rule = Rule(f"model.layers.{index}.{theirs}.{kind}", (f"layers.{index}.{ours}.{kind}",))
            result.append(rule)
    return result


def _moe_layer(model_type: str, index: int, config: MegatronModelConfig) -> list[Rule]:
    """A layer of a family with experts: in files each expert has its own matrices."""
    rules = _llama_layer(index, config)
    if not has_experts(config, index):
        return rules
    theirs, ours = f"model.layers.{index}.{moe_prefix(model_type)}.", f"layers.{index}.mlp."
    rules.append(Rule(f"{theirs}gate.weight", (f"{ours}router.weight",)))
    if config.router_load_balancing == "bias":
        bias = f"{ours}router.selection_bias"
        rules.append(Rule(f"{theirs}gate.e_score_correction_bias", (bias,)))
    for name, matrix in expert_matrices(model_type).items():
        rules += [
            Rule(f"{theirs}experts.{expert}.{matrix}.weight", (f"{ours}experts.{name}",), expert=expert)
            for expert in range(config.num_experts or 0)
        ]
    if config.num_shared_experts:
        rules += [
            Rule(f"{theirs}shared_experts.{name}_proj.weight", (f"{ours}shared.{name}.weight",))
            for name in ("gate", "up", "down")
        ]
    return rules


def export_tensors(
    model_type: str, config: MegatronModelConfig, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, one at a time.

    Args:
        model_type: the family.
        config: the architecture.
        read: our parameter by name.
    """
    for ours, group in groupby(rules(model_type, config), key=lambda rule: rule.ours):
        tensors = [read(name) for name in ours]  # once for all experts
        for rule in group:
            yield rule.theirs, rule.to_theirs(tensors)


def import_tensors(
    model_type: str,
    config: MegatronModelConfig,
    source: TensorFolder,
    where: str,
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Our parameters by name, from a family's files, one tensor in memory at a time.

    Args:
        model_type: the family.
        config: the architecture.
        source: their tensors.
        where: named in errors.
        wanted: only these of ours, and what lies in one tensor with them; ``None`` is all.

    Raises:
        CheckpointError: tensors are missing or left over; all are named.
    """
    places = _places(model_type, config, source, where)
    for ours, group in groupby(places.items(), key=lambda item: item[0].ours):
        if wanted is not None and not any(name in wanted for name in ours):
            continue
        found = list(group)
        rule, name = found[0]
        if rule.expert is None:
            yield from zip(ours, rule.to_ours(source.read(name)))
        else:
            yield ours[0], _experts(found, config, source)


def _places(
    model_type: str, config: MegatronModelConfig, source: TensorFolder, where: str
) -> dict[Rule, str]:
    """Where each rule's tensor is found."""
    sought = {rule: _find(rule.theirs, source) for rule in rules(model_type, config)}
    places = {rule: name for rule, name in sought.items() if name is not None}
    missing = [rule.theirs for rule in sought if rule not in places]
    extra = sorted(
        name for name in source.names - set(places.values()) if not _may_be_left_over(name, config)
    )
    if missing or extra:
        problems = [f"tensor {name} is missing" for name in missing]
        problems += [f"tensor {name} belongs to no parameter" for name in extra]
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{where}: the weights do not fit config.json: {shown}.")
    return places


def _experts(found: list[tuple[Rule, str]], config: MegatronModelConfig, source: TensorFolder) -> Tensor:
    """One parameter of ours from the matrices of all experts."""
    whole: Tensor | None = None
    for rule, name in found:
        matrix = source.read(name)
        if whole is None:
            whole = matrix.new_empty(config.num_experts or 0, *matrix.shape)
        whole[rule.expert] = matrix  # type: ignore[index]
    assert whole is not None
    return whole


def _find(name: str, source: TensorFolder) -> str | None:
    """The name as it is, or without the family's prefix, as files of the bare model have it."""
    bare = name.split(".", 1)[1]
    return next((candidate for candidate in (name, bare) if candidate in source.names), None)


def _may_be_left_over(name: str, config: MegatronModelConfig) -> bool:
    tied_copy = config.tie_word_embeddings and name == "lm_head.weight"
    return tied_copy or name.endswith(_IGNORED_ENDINGS)
