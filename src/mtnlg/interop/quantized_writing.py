"""Quantized models as folders: compressed-tensors, which vLLM and transformers load, and our own.

GPT-2 keeps its matrices the other way round, which compressed-tensors does not know: such models, and those
that no family computes, are saved under our own names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtnlg.config import CheckpointError, ConfigError
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.interop.architectures import nearest_architecture, to_hugging_face
from mtnlg.interop.quantized_methods import COMPRESSED, KEY, OWN, format_of
from mtnlg.interop.rule import Rule
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES, write_tensors
from mtnlg.interop.weights import EMBEDDING, HEAD, rules
from mtnlg.interop.words import pack_words
from mtnlg.model import MegatronLmDecoder
from mtnlg.quantization import QuantizedLinear, quantized_linears
from mtnlg.quantization.model import CODE_NAMES
from mtnlg.quantization.model import HEAD as HEAD_MODULE
from mtnlg.quantization.numbers import FLOAT8, in_order

OWN_TYPE = "mtnlg"


def write_quantized(
    model: MegatronLmDecoder,
    folder: Path,
    *,
    end_of_text_id: int | None = None,
    padding_id: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Write a quantized model in the format that most programs load.

    Args:
        model: with :class:`~mtnlg.quantization.QuantizedLinear` layers.
        folder: created if need be.
        end_of_text_id: recorded as the end (and begin) token.
        padding_id: recorded likewise.
        dtype: of what is not quantized; ``None`` keeps it.
        max_shard_bytes: largest weight file.

    Returns:
        ``compressed-tensors`` or ``mtnlg``.

    Raises:
        CheckpointError: the disk refused.
    """
    found = _rules_of_compressed(model)
    config = replace(model.config, quantize=False, quantize_config=None)
    tokens = dict(bos_token_id=end_of_text_id, eos_token_id=end_of_text_id, pad_token_id=padding_id)
    own = next(iter(quantized_linears(model).values())).config
    if found is None:
        saved = dict(model_type=OWN_TYPE, mtnlg=config.to_dict(), **tokens)
        saved[KEY] = dict(quant_method=OWN, **_config_of(model).to_dict())
        tensors = _own_tensors(model, dtype)
    else:
        saved = {**to_hugging_face(config), **tokens, KEY: _compressed_config(model, own, found)}
        saved["dtype"] = str(dtype or model.get_parameter(EMBEDDING).dtype).removeprefix("torch.")
        tensors = _compressed_tensors(model, found, dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder, tensors, max_shard_bytes)
        (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: the model could not be saved ({error}).") from error
    return OWN if found is None else COMPRESSED


def _config_of(model: MegatronLmDecoder) -> QuantizeConfig:
    """How the model is quantized, its head too."""
    linears = quantized_linears(model)
    head = linears.get(HEAD_MODULE)
    layers = [linear.config for name, linear in linears.items() if name != HEAD_MODULE]
    body = layers[0] if layers else QuantizeConfig()
    how = "float" if head is None else "same" if head.config.weights == body.weights else "int8"
    return replace(body, head=how)


def _rules_of_compressed(model: MegatronLmDecoder) -> list[Rule] | None:
    """The family's rules, if compressed-tensors can hold all of the model's matrices."""
    try:
        found = rules(nearest_architecture(model.config).model_type, model.config)
    except ConfigError:
        return None
    quantized = {f"{name}.weight" for name in quantized_linears(model)}
    touched = [rule for rule in found if quantized & set(rule.ours)]
    whole = all(quantized >= set(rule.ours) and not rule.is_transposed for rule in touched)
    linears = quantized_linears(model)
    is_cut_evenly = all(linear.in_features % linear.group_length == 0 for linear in linears.values())
    orders = [[linears[name.removesuffix(".weight")].order for name in rule.ours] for rule in touched]
    is_alike = all(_same_order(*rest) for rest in orders) if whole else False
    return found if is_alike and is_cut_evenly else None


def _same_order(first: Tensor | None, *others: Tensor | None) -> bool:
    """Whether columns of matrices that lie in one of theirs stand in one order."""
    return all(
        other is first or (other is not None and first is not None and torch.equal(other, first))
        for other in others
    )


def _own_tensors(model: MegatronLmDecoder, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    is_tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == HEAD and is_tied:
            continue
        is_of_codes = name.rpartition(".")[2] in CODE_NAMES
        yield name, tensor if is_of_codes else tensor.to(dtype)


def _compressed_config(model: MegatronLmDecoder, own: QuantizeConfig, found: list[Rule]) -> dict[str, Any]:
    linears = quantized_linears(model)
    floats = {f"{name}.weight" for name, module in model.named_modules() if type(module) is nn.Linear}
    ignored = [rule.theirs.removesuffix(".weight") for rule in found if floats & set(rule.ours)]
    is_float, length = own.weights == "float8", own.inputs_per_scale
    number = dict(num_bits=own.bits, type="float" if is_float else "int", symmetric=own.symmetric)
    if any(linear.order is not None for linear in linears.values()):
        number["actorder"] = "group"
    weights = dict(
        number, strategy="group" if length else "channel", group_size=length or None, dynamic=False
    )
    inputs = None
    if own.activations == "int8":
        inputs = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    group = dict(targets=["Linear"], weights=weights, input_activations=inputs, output_activations=None)
    return dict(
        quant_method=COMPRESSED,
        format=format_of(own),
        quantization_status="compressed",
        config_groups=dict(group_0=group),
        ignore=sorted({"lm_head", *ignored}),
        kv_cache_scheme=None,
    )


def _compressed_tensors(
    model: MegatronLmDecoder, found: list[Rule], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    linears, state = quantized_linears(model), dict(model.named_parameters(remove_duplicate=False))
    for rule in found:
        own = [linears.get(name.removesuffix(".weight")) for name in rule.ours]
        if rule.ours == (HEAD,) and own[0] is not None:
            yield rule.theirs, own[0].dequantize().to(dtype or own[0].dtype)
        elif own[0] is None or not rule.ours[0].endswith(".weight"):
            yield rule.theirs, rule.to_theirs([state[name].detach() for name in rule.ours]).to(dtype)
        else:
            yield from _compressed(rule, [linear for linear in own if linear is not None])


def _compressed(rule: Rule, linears: list[QuantizedLinear]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one of their matrices."""
    base, config = rule.theirs.removesuffix("weight"), linears[0].config
    parts = [linear.unpacked() for linear in linears]
    order, length = linears[0].order, linears[0].group_length
    codes = in_order(rule.to_theirs([part.codes.view(torch.int8) for part in parts]), order)
    scales = rule.to_theirs([part.scales for part in parts])
    if format_of(config) == "pack-quantized":
        yield f"{base}weight_packed", pack_words(codes, config.bits)
        yield f"{base}weight_shape", torch.tensor(codes.shape)
    else:
        yield f"{base}weight", codes.view(FLOAT8) if config.weights == "float8" else codes
    if order is not None:
        groups = torch.arange(len(order), dtype=torch.int32) // length
        yield f"{base}weight_g_idx", torch.empty_like(groups).index_copy_(0, order.long(), groups)
    yield f"{base}weight_scale", scales
    if parts[0].zeros is not None:
        zeros = rule.to_theirs([part.zeros for part in parts if part.zeros is not None])
        packed = pack_words(zeros.t().contiguous(), config.bits).t().contiguous()
        yield f"{base}weight_zero_point", packed if format_of(config) == "pack-quantized" else zeros
