"""Folders of quantized models: compressed-tensors, which vLLM and transformers load, and our own.

compressed-tensors (checked with its release 0.20) keeps each matrix of a Hugging Face family as
``weight_packed`` (int32, the first of four or eight codes in the lowest bits), ``weight_scale`` [out,
groups], ``weight_shape``, and ``weight_zero_point`` packed along the outputs; matrices of 8 bits whose
activations are rounded too, and float8, are ``weight`` as they are. GPT-2 keeps its matrices the other way
round, which the format does not know: such models, and those that no family computes, are saved under our
own names.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.interop.architectures import from_hugging_face, nearest_architecture, to_hugging_face
from mtnlg.interop.lazy_tensor import Cut
from mtnlg.interop.rule import Rule
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES, TensorFolder, write_tensors
from mtnlg.interop.weights import EMBEDDING, HEAD, rules
from mtnlg.model import MegatronLmDecoder
from mtnlg.quantization import QuantizedLinear, quantized_linears
from mtnlg.quantization.model import CODE_NAMES, config_of
from mtnlg.quantization.model import HEAD as HEAD_MODULE
from mtnlg.quantization.numbers import FLOAT8, Codes, dequantize, group_length, pack_int4, unpack_int4

KEY = "quantization_config"
OWN, COMPRESSED = "mtnlg", "compressed-tensors"
OWN_TYPE = "mtnlg"
_WORD = 32  # bits


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What ``config.json`` says of quantization; ``None`` where it says nothing."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = saved.get(KEY) if isinstance(saved, dict) else None
    return found or None


# -- writing


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
        saved = {**to_hugging_face(config), **tokens, KEY: _compressed_config(own)}
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
    is_cut_evenly = all(
        linear.in_features % linear.group_length == 0 for linear in quantized_linears(model).values()
    )
    return found if whole and is_cut_evenly else None


def _own_tensors(model: MegatronLmDecoder, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    is_tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if name == HEAD and is_tied:
            continue
        is_of_codes = name.rpartition(".")[2] in CODE_NAMES
        yield name, tensor if is_of_codes else tensor.to(dtype)


def _compressed_config(own: QuantizeConfig) -> dict[str, Any]:
    is_float, length = own.weights == "float8", own.inputs_per_scale
    number = dict(num_bits=own.bits, type="float" if is_float else "int", symmetric=own.symmetric)
    weights = dict(
        number, strategy="group" if length else "channel", group_size=length or None, dynamic=False
    )
    inputs = None
    if own.activations == "int8":
        inputs = dict(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    group = dict(targets=["Linear"], weights=weights, input_activations=inputs, output_activations=None)
    return dict(
        quant_method=COMPRESSED,
        format=_format_of(own),
        quantization_status="compressed",
        config_groups=dict(group_0=group),
        ignore=["lm_head"],
        kv_cache_scheme=None,
    )


def _format_of(own: QuantizeConfig) -> str:
    if own.weights == "float8":
        return "float-quantized"
    return "int-quantized" if own.weights == "int8" and own.activations == "int8" else "pack-quantized"


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
    codes = rule.to_theirs([part.codes.view(torch.int8) for part in parts])
    scales = rule.to_theirs([part.scales for part in parts])
    if _format_of(config) == "pack-quantized":
        yield f"{base}weight_packed", pack_words(codes, config.bits)
        yield f"{base}weight_shape", torch.tensor(codes.shape)
    else:
        yield f"{base}weight", codes.view(FLOAT8) if config.weights == "float8" else codes
    yield f"{base}weight_scale", scales
    if parts[0].zeros is not None:
        zeros = rule.to_theirs([part.zeros for part in parts if part.zeros is not None])
        packed = pack_words(zeros.t().contiguous(), config.bits).t().contiguous()
        yield f"{base}weight_zero_point", packed if _format_of(config) == "pack-quantized" else zeros


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """[out, in] int8 → [out, in · bits / 32 rounded up] int32, the first code in the lowest bits."""
    filled = F.pad(codes, (0, -codes.shape[1] % (_WORD // bits)))
    unsigned = (filled.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        unsigned = pack_int4(unsigned.view(torch.int8))
    return unsigned.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of :func:`pack_words`, the first ``count`` codes of each row."""
    unsigned = words.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=-1).flatten(1)
    return (unsigned[:, :count].to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


# -- reading


def read_quantized_config(folder: Path) -> MegatronModelConfig:
    """The architecture and how it is quantized.

    Raises:
        CheckpointError: the method of quantization is none of those that are read.
    """
    where = str(folder / "config.json")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = saved.pop(KEY)
    method = quantization.get("quant_method")
    try:
        if method == OWN:
            own = {name: value for name, value in quantization.items() if name != "quant_method"}
            model, config = MegatronModelConfig(**saved["mtnlg"]), QuantizeConfig.from_dict(own)
        elif method == COMPRESSED:
            model, config = from_hugging_face(saved, where), _from_compressed(quantization, where)
        else:
            raise CheckpointError(
                f"{where}: weights quantized by {method!r} are not read, only {COMPRESSED} and {OWN}: take "
                "the model in floating point and quantize it here (--quantize)."
            )
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: {KEY}: {error}") from None
    return replace(model, quantize=True, quantize_config=config.to_dict())


def _from_compressed(saved: dict[str, Any], where: str) -> QuantizeConfig:
    groups = list(saved["config_groups"].values())
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    is_float = weights["type"] == "float"
    known = dict(targets=["Linear"]), ("group", "channel"), (4, 8)
    is_known = len(groups) == 1 and groups[0]["targets"] == known[0]["targets"]
    is_known = is_known and weights["strategy"] in known[1] and weights["num_bits"] in known[2]
    if inputs is not None:
        is_known = is_known and (inputs["num_bits"], inputs["type"], inputs["strategy"]) == (
            8,
            "int",
            "token",
        )
    if not is_known or "lm_head" not in saved.get("ignore", []):
        raise CheckpointError(
            f"{where}: {KEY}: only one group of all linear layers but lm_head is read, with 4 or 8 bits by "
            "group or row, and activations in 8 bits by token or not at all."
        )
    return QuantizeConfig(
        "float8" if is_float else f"int{weights['num_bits']}",
        weights.get("group_size") or 0,
        bool(weights.get("symmetric", True)),
        "float" if inputs is None else "int8",
        "float",
    )


def read_quantized(folder: Path, config: MegatronModelConfig) -> dict[str, Tensor]:
    """Codes, scales and all that is not quantized, by our names; a tied head is not among them.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are.
    """
    source = TensorFolder.of_hugging_face(folder)
    quantization = quantization_of(folder)
    if quantization is not None and quantization.get("quant_method") == OWN:
        state = {name: source.read(name) for name in sorted(source.names)}
    else:
        state = dict(_read_compressed(source, config, str(folder)))
    is_float_head = QuantizeConfig.from_dict(config.quantize_config).for_head() is None
    if config.tie_word_embeddings and is_float_head:
        state[HEAD] = state[EMBEDDING]
    return state


def _read_compressed(
    source: TensorFolder, config: MegatronModelConfig, where: str
) -> Iterator[tuple[str, Tensor]]:
    own, missing = QuantizeConfig.from_dict(config.quantize_config), []
    for rule in rules(nearest_architecture(config).model_type, config):
        base = rule.theirs.removesuffix("weight")
        if f"{base}weight_scale" in source.names:
            try:
                codes = _read_codes(source, base, own)
            except KeyError as error:
                missing.append(str(error))
                continue
            yield from _ours(rule, codes, own)
        elif rule.theirs in source.names:
            yield from zip(rule.ours, rule.to_ours(source.read(rule.theirs)))
        else:
            missing.append(rule.theirs)
    if missing:
        raise CheckpointError(f"{where}: tensors are missing: {', '.join(missing[:8])}.")


def _read_codes(source: TensorFolder, base: str, own: QuantizeConfig) -> Codes:
    scales, zeros = source.read(f"{base}weight_scale").float(), None
    if _format_of(own) != "pack-quantized":
        codes = source.read(f"{base}weight")
    else:
        _, inputs = source.read(f"{base}weight_shape").tolist()
        codes = unpack_words(source.read(f"{base}weight_packed"), own.bits, inputs)
    if not own.symmetric:
        zeros = source.read(f"{base}weight_zero_point")
        if _format_of(own) == "pack-quantized":
            zeros = unpack_words(zeros.t().contiguous(), own.bits, len(codes)).t()
    return Codes(codes, scales, zeros)


def _ours(rule: Rule, codes: Codes, own: QuantizeConfig) -> Iterator[tuple[str, Tensor]]:
    outputs = rule.to_ours(codes.codes.view(torch.int8))
    scales = rule.to_ours(codes.scales)
    zeros = [None] * len(outputs) if codes.zeros is None else rule.to_ours(codes.zeros)
    for name, part, scale, zero in zip(rule.ours, outputs, scales, zeros):
        base = name.removesuffix("weight")
        if own.weights == "int4":
            part = pack_int4(part)
        elif own.weights == "float8":
            part = part.contiguous().view(torch.uint8)
        yield f"{base}codes", part.contiguous()
        yield f"{base}scales", scale.contiguous()
        if zero is not None:
            yield f"{base}zeros", zero.contiguous()


def stream_quantized(
    folder: Path,
    config: MegatronModelConfig,
    wanted: Collection[str] | None = None,
    cut: Cut | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Parameters in floating point, as if nothing had been quantized; a tied head is not among them.

    Args:
        folder: as :func:`write_quantized` leaves it.
        config: as :func:`read_quantized_config` gives it.
        wanted: only these; ``None`` is all there is, codes and scales as they are.
        cut: what is wanted of each: a view of it.
    """
    state, own = read_quantized(folder, config), QuantizeConfig.from_dict(config.quantize_config)
    if config.tie_word_embeddings:
        state.pop(HEAD, None)
    if wanted is None:
        yield from state.items()
        return
    for name in wanted:
        base = name.removesuffix(".weight")
        if name in state:
            yield name, state[name] if cut is None else cut(name, state[name])
        elif f"{base}.codes" in state and not (name == HEAD and config.tie_word_embeddings):
            whole = _dequantized(state, base, own)
            yield name, whole if cut is None else cut(name, whole)


def _dequantized(state: dict[str, Tensor], base: str, config: QuantizeConfig) -> Tensor:
    own = config_of(base, config)
    assert own is not None
    codes, scales, zeros = (state.get(f"{base}.{key}") for key in CODE_NAMES)
    assert codes is not None and scales is not None
    if own.weights == "int4":
        codes = unpack_int4(codes, 2 * codes.shape[1])
    elif own.weights == "float8":
        codes = codes.view(FLOAT8)
    length = group_length(own, codes.shape[1])
    return dequantize(Codes(codes, scales, zeros), length)
