"""Folders of quantized models, read: our own, and those of the methods of others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.interop.architectures import from_hugging_face
from mtnlg.interop.lazy_tensor import Cut
from mtnlg.interop.quantized_methods import KEY, METHODS, OWN, Matrix, Method
from mtnlg.interop.rule import Rule
from mtnlg.interop.tensor_folder import TensorFolder
from mtnlg.interop.weights import EMBEDDING, HEAD, may_be_left_over, rules
from mtnlg.quantization.model import config_of
from mtnlg.quantization.numbers import (
    FLOAT8,
    Codes,
    dequantize,
    group_length,
    in_order,
    pack_int4,
    unpack_int4,
)

_ALONE = "quantize_config.json"  # where GPTQ's first programs say it


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """What a folder says of quantization; ``None`` where it says nothing."""
    saved = _json(folder / "config.json")
    found = saved.get(KEY) or None
    if found is None and (folder / _ALONE).is_file() and "model_type" in saved:
        found = {"quant_method": "gptq", **_json(folder / _ALONE)}
    return found if isinstance(found, dict) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_quantized_config(folder: Path) -> MegatronModelConfig:
    """The architecture and how it is quantized.

    Raises:
        CheckpointError: the method of quantization is none of those that are read.
    """
    where, saved, said = str(folder / "config.json"), _json(folder / "config.json"), quantization_of(folder)
    saved.pop(KEY, None)
    said = dict(said or {})
    method = said.pop("quant_method", None)
    try:
        if method == OWN:
            model, config = MegatronModelConfig(**saved["mtnlg"]), QuantizeConfig.from_dict(said)
        elif method in METHODS:
            names = TensorFolder.of_hugging_face(folder).names
            model, config = from_hugging_face(saved, where), METHODS[method].config(said, names, where)
        else:
            raise CheckpointError(
                f"{where}: weights quantized by {method!r} are not read, only {', '.join(METHODS)} and "
                f"{OWN}: take the model in floating point and quantize it here (--quantize)."
            )
    except (ConfigError, KeyError, TypeError, IndexError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: {KEY}: {error}") from None
    return replace(model, quantize=True, quantize_config=config.to_dict())


def read_quantized(folder: Path, config: MegatronModelConfig) -> dict[str, Tensor]:
    """Codes, scales and all that is not quantized, by our names; a tied head is not among them.

    Raises:
        CheckpointError: files are missing or damaged, or tensors are missing, left over or damaged.
    """
    state = dict(_all(folder, config))
    is_float_head = QuantizeConfig.from_dict(config.quantize_config).for_head() is None
    if config.tie_word_embeddings and is_float_head:
        state[HEAD] = state[EMBEDDING]
    return state


def _all(folder: Path, config: MegatronModelConfig) -> Iterator[tuple[str, Tensor]]:
    """What the files hold, by our names, one matrix in memory at a time."""
    source, said = TensorFolder.of_hugging_face(folder), dict(quantization_of(folder) or {})
    if said.get("quant_method") == OWN:
        yield from ((name, source.read(name)) for name in sorted(source.names))
    else:
        yield from _Reader(folder, source, config, said).state(None)


def stream_quantized(
    folder: Path,
    config: MegatronModelConfig,
    wanted: Collection[str] | None = None,
    cut: Cut | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Parameters in floating point, as if nothing had been quantized; a tied head is not among them.

    Args:
        folder: quantized.
        config: as :func:`read_quantized_config` gives it.
        wanted: only these; ``None`` is all there is, codes and scales as they are.
        cut: what is wanted of each: a view of it.
    """
    own = QuantizeConfig.from_dict(config.quantize_config)
    if wanted is None:
        yield from _all(folder, config)
        return
    source, said = TensorFolder.of_hugging_face(folder), dict(quantization_of(folder) or {})
    sought = [name for name in wanted if not (name == HEAD and config.tie_word_embeddings)]
    if said.get("quant_method") == OWN:
        found = _floats_of_ours(source, sought, own)
    else:
        found = _floats(_Reader(folder, source, config, said).state(set(sought)), own)
    for name, whole in found:
        if name in sought:
            yield name, whole if cut is None else cut(name, whole).clone()


def _floats_of_ours(
    source: TensorFolder, names: Collection[str], own: QuantizeConfig
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        base = name.removesuffix("weight")
        parts = {
            key for key in source.names if key.rpartition(".")[0] + "." == base and key != f"{base}bias"
        }
        if name in source.names:
            yield name, source.read(name)
        elif parts:
            yield name, _dequantized({key.removeprefix(base): source.read(key) for key in parts}, base, own)


def _floats(state: Iterator[tuple[str, Tensor]], own: QuantizeConfig) -> Iterator[tuple[str, Tensor]]:
    """Codes become the matrices that they stand for."""
    is_of_codes = lambda item: item[0].rpartition(".")[2] in _OF_CODES  # noqa: E731
    for (base, of_codes), group in groupby(state, lambda item: (_base(item[0]), is_of_codes(item))):
        if of_codes:
            parts = {name.removeprefix(base): tensor for name, tensor in group}
            yield f"{base}weight", _dequantized(parts, base, own)
        else:
            yield from group


_OF_CODES = ("codes", "scales", "zeros", "order")


def _base(name: str) -> str:
    return name.rpartition(".")[0] + "."


def _dequantized(parts: dict[str, Tensor], base: str, config: QuantizeConfig) -> Tensor:
    """[out, in] float32 from the parts of a matrix."""
    own = config_of(base, config)
    assert own is not None
    codes = parts["codes"]
    if own.weights == "int4":
        codes = unpack_int4(codes, 2 * codes.shape[1])
    elif own.weights == "float8":
        codes = codes.view(FLOAT8)
    length = group_length(own, codes.shape[1])
    said = dequantize(Codes(codes, parts["scales"], parts.get("zeros")), length)
    return in_order(said, parts.get("order"))


@dataclass(frozen=True)
class _Reader:
    """A folder of others.

    Args:
        folder: for messages.
        source: its tensors.
        config: the architecture and its quantization.
        said: what ``config.json`` says of quantization.
    """

    folder: Path
    source: TensorFolder
    config: MegatronModelConfig
    said: dict[str, Any]

    def state(self, wanted: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
        """Our state of these parameters (``None``: of all), codes and scales as they are."""
        model_type = str(_json(self.folder / "config.json")["model_type"])
        own, used, missing = QuantizeConfig.from_dict(self.config.quantize_config), set[str](), list[str]()
        for ours, group in groupby(rules(model_type, self.config), key=lambda rule: rule.ours):
            if wanted is not None and not any(name in wanted for name in ours):
                continue
            held = list(group)
            try:
                found = [(rule, *self._read(rule, own)) for rule in held]
            except KeyError as error:
                missing.append(str(error.args[0]))
                continue
            used.update(*(names for _, _, names in found))
            yield from self._ours(found, own)
        self._complain(missing, set() if wanted is not None else self.source.names - used)

    def _read(self, rule: Rule, own: QuantizeConfig) -> tuple[Matrix | Tensor, set[str]]:
        base, names = rule.theirs.removesuffix("weight"), self.source.names
        if any(f"{base}{mark}" in names for mark in self._method.marks):
            matrix = self._method.read(self.source, base, own, self.said)
            return matrix, matrix.used
        for name in (rule.theirs, rule.theirs.split(".", 1)[1]):
            if name in names:
                return self.source.read(name), {name}
        raise KeyError(rule.theirs)

    @property
    def _method(self) -> Method:
        return METHODS[self.said["quant_method"]]

    def _ours(
        self, found: list[tuple[Rule, Matrix | Tensor, set[str]]], own: QuantizeConfig
    ) -> Iterator[tuple[str, Tensor]]:
        rule, first, _ = found[0]
        if rule.expert is not None:  # experts are one tensor of ours, in floating point
            yield rule.ours[0], torch.stack([self._whole(matrix, own) for _, matrix, _ in found])
        elif isinstance(first, Tensor):
            yield from zip(rule.ours, rule.to_ours(first))
        else:
            yield from _parts(replace(rule, is_transposed=False), first, own)

    def _whole(self, matrix: Matrix | Tensor, own: QuantizeConfig) -> Tensor:
        if isinstance(matrix, Tensor):
            return matrix
        saved = _json(self.folder / "config.json")
        dtype = getattr(torch, str(saved.get("dtype", saved.get("torch_dtype"))), torch.float32)
        length = group_length(own, matrix.codes.codes.shape[1])
        return in_order(dequantize(matrix.codes, length), matrix.order).to(dtype)

    def _complain(self, missing: list[str], extra: set[str]) -> None:
        """Raise if tensors are missing, or some would be left out that are not all zero."""
        left = [name for name in sorted(extra) if not may_be_left_over(name, self.config)]
        left = [n for n in left if not (n.endswith(".bias") and not bool(self.source.read(n).any()))]
        problems = [f"tensors are missing: {', '.join(missing[:8])}"] if missing else []
        problems += [f"tensors belong to no parameter: {', '.join(left[:8])}"] if left else []
        if problems:
            raise CheckpointError(f"{self.folder}: {'; '.join(problems)}.")


def _parts(rule: Rule, matrix: Matrix, own: QuantizeConfig) -> Iterator[tuple[str, Tensor]]:
    """Codes, scales, zeros and order of each of ours."""
    codes = matrix.codes
    outputs, scales = rule.to_ours(codes.codes.view(torch.int8)), rule.to_ours(codes.scales)
    zeros = [None] * len(outputs) if codes.zeros is None else rule.to_ours(codes.zeros)
    for name, part, scale, zero in zip(rule.ours, outputs, scales, zeros):
        base = name.removesuffix("weight")
        if own.weights == "int4":
            part = pack_int4(part)
        elif own.weights == "float8":
            part = part.contiguous().view(torch.uint8)
        yield f"{base}codes", part.contiguous()
        yield f"{base}scales", scale.clone(memory_format=torch.contiguous_format)
        if zero is not None:
            yield f"{base}zeros", zero.contiguous()
        if matrix.order is not None:
            yield f"{base}order", matrix.order.clone()
