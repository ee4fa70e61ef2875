"""Adapter folders as PEFT writes and reads them: ``adapter_config.json`` and safetensors.

Where a family keeps several of our matrices in one tensor (GPT-2's and Phi-3's query, key and value),
PEFT has one update for all of them. Read, each of ours gets the whole of A and its rows of B; written,
their A's stand below each other, the B's in blocks, and rank and alpha grow alike. A model that no Hugging
Face family computes keeps our own names. ``mtnlg_adapter.json`` says what PEFT has no words for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.config.adapter import EMBEDDING_TARGET, HEAD_TARGET, AdapterConfig
from mtnlg.interop.adapter import Adapter, LowRank
from mtnlg.interop.architectures import nearest_architecture
from mtnlg.interop.rule import Rule
from mtnlg.interop.tensor_folder import TensorFolder
from mtnlg.interop.weights import rules

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
OWN_NAME = "mtnlg_adapter.json"
_PREFIX, _PROMPT = "base_model.model.", "prompt_embeddings"
_DOWN, _UP, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_DOWN_OF_EMBEDDING, _UP_OF_EMBEDDING = ".lora_embedding_A", ".lora_embedding_B"
_TYPES = {"LORA": "lora", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}
_ENDS = (EMBEDDING_TARGET, HEAD_TARGET)
# What would change the model beside what we read, and its harmless values.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "prefix_projection": (False, None),
    "trainable_token_indices": (None, [], {}),
}


def is_adapter(folder: Path) -> bool:
    """Whether an adapter lies in ``folder``."""
    return (folder / CONFIG_NAME).is_file()


def base_name(folder: Path) -> str:
    """The base that an adapter's folder names.

    Raises:
        CheckpointError: it names none.
    """
    name = _read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(
            f"{folder}: adapter_config.json names no base model. Load the base and then the adapter "
            "(model.load_adapter), or write base_model_name_or_path into the file."
        )
    return str(name)


def write_adapter(
    folder: Path, adapter: Adapter, config: MegatronModelConfig, base: str | None = None
) -> None:
    """Write a folder that PEFT and :func:`read_adapter` load.

    Args:
        folder: created if need be.
        adapter: what to write.
        config: of its base.
        base: name or path of the base.

    Raises:
        CheckpointError: the disk refused.
    """
    saved = {
        "task_type": "CAUSAL_LM" if config.architecture == "decoder" else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if adapter.config.method == "lora":
        fields, tensors = _lora_to_peft(adapter, config)
    else:
        fields, tensors = _virtual_to_peft(adapter, config)
    own = {"base_fingerprint": adapter.base_fingerprint, "adapter": asdict(adapter.config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(written, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        for name, content in ((CONFIG_NAME, {**saved, **fields}), (OWN_NAME, own)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: the adapter could not be saved ({error}).") from error


def read_adapter(folder: Path, config: MegatronModelConfig) -> Adapter:
    """The adapter in ``folder``, for a base of architecture ``config``.

    Raises:
        CheckpointError: files are missing or broken, of a kind that is not ours, or for another model.
    """
    saved = _read_json(folder / CONFIG_NAME)
    method = _TYPES.get(str(saved.get("peft_type")))
    if method is None:
        raise CheckpointError(
            f"{folder}: peft_type is {saved.get('peft_type')!r}; adapters of these kinds are read: "
            f"{', '.join(_TYPES)}."
        )
    for key, harmless in _HARMLESS.items():
        if saved.get(key) not in harmless:
            raise CheckpointError(f"{folder}: {key} is {saved[key]!r}, which is not supported.")
    own = _read_json(folder / OWN_NAME) if (folder / OWN_NAME).is_file() else {}
    source = TensorFolder.of_folder(folder)
    tensors = {name: source.read(name).clone() for name in source.names}
    try:
        made = AdapterConfig(**own["adapter"]) if own else AdapterConfig(method=method, **_fields(saved))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    fingerprint = own.get("base_fingerprint")
    if method == "lora":
        low_rank = _lora_from_peft(saved, made, tensors, config, str(folder))
        if not own:
            made = replace(made, target_modules=_endings(low_rank))
        return Adapter(made, fingerprint, low_rank)
    if _PROMPT not in tensors:
        raise CheckpointError(f"{folder}: tensor {_PROMPT} is missing.")
    prompt = tensors[_PROMPT]
    if config.has_encoder and saved.get("num_transformer_submodules") == 2:
        prompt = prompt[: made.num_virtual_tokens].clone()  # PEFT keeps rows for a decoder, and reads none
    return _virtual_from_peft(made, fingerprint, prompt, config, str(folder))


def _fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    if saved["peft_type"] != "LORA":
        return {"num_virtual_tokens": saved["num_virtual_tokens"]}
    return {
        "rank": saved["r"],
        "alpha": float(saved["lora_alpha"]),
        "dropout": float(saved.get("lora_dropout") or 0.0),
        "rank_stabilized": bool(saved.get("use_rslora")),
        "decomposed": bool(saved.get("use_dora")),
    }


# -- low-rank updates


def _matrices(config: MegatronModelConfig) -> list[Rule]:
    """Their matrices and which of ours they hold, by names without ``.weight``, untransposed."""
    untied = replace(config, tie_word_embeddings=False)  # a tied head has a name of its own, too
    try:
        found = rules(nearest_architecture(config).model_type, untied)
    except ConfigError:
        return []
    return [
        replace(
            rule,
            theirs=rule.theirs.removesuffix(".weight"),
            ours=tuple(name.removesuffix(".weight") for name in rule.ours),
            is_transposed=False,
            sizes=rule.sizes if len(rule.ours) > 1 else None,  # an embedding's update has other rows
            shape=None,
        )
        for rule in found
        if rule.expert is None
        and rule.theirs.endswith(".weight")
        and (rule.ours[0].startswith("layers.") or rule.ours[0].removesuffix(".weight") in _ENDS)
    ]


def _lora_to_peft(
    adapter: Adapter, config: MegatronModelConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    made, left = adapter.config, dict(adapter.low_rank)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for rule in _matrices(config):
        parts = {name: left.pop(name) for name in rule.ours if name in left}
        if parts:
            joined = _joined(rule, parts, config)
            tensors |= _named(rule.theirs, joined, rule.ours[0] == EMBEDDING_TARGET)
            ranks[rule.theirs] = len(joined.down)
    for name, one in left.items():
        tensors |= _named(name, one, name == EMBEDDING_TARGET)
        ranks[name] = len(one.down)
    grown = {name: rank for name, rank in ranks.items() if rank != made.rank}
    power = 0.5 if made.rank_stabilized else 1.0
    fields = {
        "peft_type": "LORA",
        "r": made.rank,
        "lora_alpha": made.alpha,
        "lora_dropout": made.dropout,
        "target_modules": sorted(ranks),
        "use_rslora": made.rank_stabilized,
        "use_dora": made.decomposed,
        "bias": "none",
        "fan_in_fan_out": _has_transposed(config),
        "rank_pattern": grown,
        "alpha_pattern": {name: made.alpha * (rank / made.rank) ** power for name, rank in grown.items()},
    }
    return fields, tensors


def _has_transposed(config: MegatronModelConfig) -> bool:
    try:
        return nearest_architecture(config).model_type == "gpt2"
    except ConfigError:
        return False


def _named(theirs: str, one: LowRank, is_embedding: bool) -> dict[str, Tensor]:
    name = f"{_PREFIX}{theirs}"
    if is_embedding:
        return {f"{name}{_DOWN_OF_EMBEDDING}": one.down, f"{name}{_UP_OF_EMBEDDING}": one.up}
    tensors = {f"{name}{_DOWN}": one.down, f"{name}{_UP}": one.up}
    if one.magnitude is not None:
        tensors[f"{name}{_MAGNITUDE}"] = one.magnitude
    return tensors


def _joined(rule: Rule, parts: Mapping[str, LowRank], config: MegatronModelConfig) -> LowRank:
    """The update of a tensor of theirs that holds several matrices of ours, of which some have one."""
    if len(rule.ours) == 1:
        return parts[rule.ours[0]]
    first = next(iter(parts.values()))
    total = sum(len(part.down) for part in parts.values())
    blocks, lengths, start = [], [], 0
    for name in rule.ours:
        rows = _rows(name, config)
        block = first.up.new_zeros(rows, total)
        if name in parts:
            rank = len(parts[name].down)
            block[:, start : start + rank] = parts[name].up
            start += rank
        elif first.magnitude is not None:
            raise ConfigError(
                f"DoRA of {', '.join(parts)} alone: in {rule.theirs} they stand with others, whose lengths "
                "PEFT would train too. Target all of query, key and value."
            )
        blocks.append(block)
        part = parts.get(name)
        lengths.append(block[:, 0] if part is None or part.magnitude is None else part.magnitude)
    down = torch.cat([parts[name].down for name in rule.ours if name in parts])
    magnitude = None if first.magnitude is None else rule.to_theirs(lengths)
    return LowRank(down, rule.to_theirs(blocks), first.scale, magnitude)


def _rows(name: str, config: MegatronModelConfig) -> int:
    """Outputs of one of the matrices that families keep together."""
    kind = name.rpartition(".")[2]
    if kind in ("key", "value"):
        return config.key_value_heads * config.head_size
    return config.num_attention_heads * config.head_size if kind == "query" else config.ffn_size


def _lora_from_peft(
    saved: Mapping[str, Any],
    made: AdapterConfig,
    tensors: dict[str, Tensor],
    config: MegatronModelConfig,
    where: str,
) -> dict[str, LowRank]:
    known = {rule.theirs: rule for rule in _matrices(config)}
    low_rank: dict[str, LowRank] = {}
    left = set(tensors) - _copies_of_base(tensors, known.values(), config)
    for key in sorted(tensors):
        down_ends = next((end for end in (_DOWN, _DOWN_OF_EMBEDDING) if key.endswith(end)), None)
        if down_ends is None:
            continue
        up_ends = _UP if down_ends == _DOWN else _UP_OF_EMBEDDING
        theirs = key.removeprefix(_PREFIX).removesuffix(down_ends)
        names = [f"{_PREFIX}{theirs}{ending}" for ending in (down_ends, up_ends, _MAGNITUDE)]
        down, up, magnitude = (tensors.get(name) for name in names)
        left -= set(names)
        rule = known.get(theirs)
        if rule is None and (theirs.startswith("layers.") or theirs in _ENDS):
            rule = Rule(theirs, (theirs,))
        if rule is None or down is None or up is None:
            problem = (
                f"{up_ends.split('.')[1]} is missing"
                if rule is not None
                else "no such matrix is in the model"
            )
            raise CheckpointError(f"{where}: the adapter does not fit the model: {theirs}: {problem}.")
        scale = _scale(saved, made, theirs, len(down))
        low_rank |= _apart(rule, LowRank(down, up, scale, magnitude), made)
    if left:
        shown = ", ".join(sorted(left)[:6])
        raise CheckpointError(f"{where}: the adapter does not fit the model: left over are {shown}.")
    return low_rank


def _copies_of_base(
    tensors: Mapping[str, Tensor], known: Iterable[Rule], config: MegatronModelConfig
) -> set[str]:
    """Embedding and head of the base, which PEFT writes too where one of them has an update."""
    shape = [config.vocab_size, config.embedding_width]
    names = {
        f"{_PREFIX}{rule.theirs}{ending}"
        for rule in known
        if rule.ours[0] in _ENDS
        for ending in (".weight", ".base_layer.weight")
    }
    return {name for name in names if name in tensors and list(tensors[name].shape) == shape}


def _apart(rule: Rule, one: LowRank, made: AdapterConfig) -> dict[str, LowRank]:
    """The updates of our matrices in one of theirs; what :func:`_joined` made comes apart again."""
    lengths = [None] * len(rule.ours) if one.magnitude is None else rule.to_ours(one.magnitude)
    ups = dict(zip(rule.ours, rule.to_ours(one.up)))
    names = [name for name in rule.ours if any(name.endswith(end) for end in made.target_modules)]
    names = names or list(rule.ours)
    is_joined = len(names) > 1 and len(one.down) == made.rank * len(names) and _is_blocks(names, ups, made)
    found = {}
    for number, name in enumerate(names if is_joined else rule.ours):
        part = slice(number * made.rank, (number + 1) * made.rank) if is_joined else slice(None)
        length = dict(zip(rule.ours, lengths))[name]
        found[name] = LowRank(one.down[part].clone(), ups[name][:, part].clone(), one.scale, length)
    return found


def _is_blocks(names: list[str], ups: Mapping[str, Tensor], made: AdapterConfig) -> bool:
    rank = made.rank
    return all(
        not bool(ups[name][:, : number * rank].any())
        and not bool(ups[name][:, (number + 1) * rank :].any())
        for number, name in enumerate(names)
    )


def _scale(saved: Mapping[str, Any], made: AdapterConfig, theirs: str, rank: int) -> float:
    patterns = saved.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if theirs == k or theirs.endswith(f".{k}")), made.alpha)
    return replace(made, rank=rank, alpha=float(alpha)).scale


def _endings(low_rank: Mapping[str, LowRank]) -> list[str]:
    return sorted({name if name in _ENDS else name.split(".", 2)[2] for name in low_rank})


# -- virtual tokens


def _virtual_to_peft(
    adapter: Adapter, config: MegatronModelConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields: dict[str, Any] = {
        "num_virtual_tokens": adapter.config.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "token_dim": config.hidden_size,
    }
    if adapter.prompt is not None:
        fields |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        return fields, {_PROMPT: adapter.prompt}
    assert adapter.prefix is not None
    heads = config.key_value_heads
    fields |= {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "num_attention_heads": heads}
    fields |= {"token_dim": heads * config.head_size, "encoder_hidden_size": config.hidden_size}
    return fields, {_PROMPT: adapter.prefix.permute(3, 0, 1, 2, 4).flatten(1)}


def _virtual_from_peft(
    made: AdapterConfig,
    fingerprint: str | None,
    tensor: Tensor,
    config: MegatronModelConfig,
    where: str,
) -> Adapter:
    layers, heads, size = config.num_hidden_layers, config.key_value_heads, config.head_size
    width = config.embedding_width if made.method == "prompt" else layers * 2 * heads * size
    if list(tensor.shape) != [made.num_virtual_tokens, width]:
        raise CheckpointError(
            f"{where}: the adapter does not fit the model: {_PROMPT} has the shape {list(tensor.shape)}, "
            f"and {[made.num_virtual_tokens, width]} is expected."
        )
    if made.method == "prompt":
        return Adapter(made, fingerprint, prompt=tensor)
    prefix = tensor.unflatten(1, (layers, 2, heads, size)).permute(1, 2, 3, 0, 4)
    return Adapter(made, fingerprint, prefix=prefix.contiguous())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON ({error}).") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: it must hold a JSON object, not a {type(parsed).__name__}.")
    return parsed
