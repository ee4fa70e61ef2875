"""How others keep quantized matrices, method by method: what ``config.json`` says, and the tensors.

``compressed-tensors`` (checked with its release 0.20): ``weight_packed`` (int32, the first of four or eight
codes in the lowest bits), ``weight_scale`` [out, groups], ``weight_shape``, ``weight_zero_point`` packed
along the outputs, ``weight_g_idx`` [in]; matrices of 8 bits whose activations are rounded too, and float8,
are ``weight`` as they are. ``gptq``: ``qweight`` packed along the inputs, ``qzeros`` along the outputs,
``scales`` [groups, out], ``g_idx`` [in], the group of each input. ``awq``: ``qweight`` and ``qzeros``
packed along the outputs, eight of a word in an order of their own. ``fp8``: ``weight`` in e4m3 beside
``weight_scale_inv`` [out / 128, in / 128] or one ``weight_scale``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.interop.tensor_folder import TensorFolder
from mtnlg.interop.words import one_more, unpack_awq, unpack_words
from mtnlg.quantization.numbers import FLOAT8, Codes, group_length

KEY = "quantization_config"
OWN, COMPRESSED = "mtnlg", "compressed-tensors"
_PER_WORD = {4: 8, 8: 4}


@dataclass(frozen=True)
class Matrix:
    """One of their matrices [out, in].

    Args:
        codes: columns of one group are neighbours.
        order: which input each column belongs to; ``None`` is one after the other.
        used: the tensors that hold it.
    """

    codes: Codes
    order: Tensor | None
    used: set[str]


@dataclass(frozen=True)
class Method:
    """One way of keeping matrices in few bits.

    Args:
        config: from what ``config.json`` says, the tensors' names and what to call the file in errors.
        read: the matrix whose tensors' names begin so.
        marks: endings of names, one of which every matrix in few bits has.
    """

    config: Callable[[dict[str, Any], set[str], str], QuantizeConfig]
    read: Callable[[TensorFolder, str, QuantizeConfig, dict[str, Any]], Matrix]
    marks: tuple[str, ...]


def format_of(own: QuantizeConfig) -> str:
    """compressed-tensors' format of matrices."""
    if own.weights == "float8":
        return "float-quantized"
    return "int-quantized" if own.weights == "int8" and own.activations == "int8" else "pack-quantized"


def _head(names: set[str], mark: str) -> str:
    return "same" if f"lm_head.{mark}" in names else "float"


# -- compressed-tensors


def _compressed_config(saved: dict[str, Any], names: set[str], where: str) -> QuantizeConfig:
    groups = list(saved["config_groups"].values())
    weights, inputs = groups[0]["weights"], groups[0].get("input_activations")
    is_float = weights["type"] == "float"
    strategies = ("group", "channel", *(("tensor", "block") if is_float else ()))
    is_known = len(groups) == 1 and groups[0]["targets"] == ["Linear"]
    is_known = is_known and weights["strategy"] in strategies and weights["num_bits"] in (4, 8)
    is_known = is_known and not (is_float and weights["num_bits"] == 4)
    if inputs is not None and not is_float:
        kind = inputs["num_bits"], inputs["type"], inputs["strategy"]
        is_known = is_known and kind == (8, "int", "token")
    if not is_known:
        raise CheckpointError(
            f"{where}: {KEY}: only one group of all linear layers is read, integers of 4 or 8 bits by "
            "group or row, float8 also by tensor or block, and activations in int8 by token or not at all."
        )
    blocks = weights.get("block_structure") or [0, 0]
    return QuantizeConfig(
        "float8" if is_float else f"int{weights['num_bits']}",
        blocks[1] if weights["strategy"] == "block" else weights.get("group_size") or 0,
        bool(weights.get("symmetric", True)),
        "float" if inputs is None or is_float else "int8",
        _head(names, "weight_scale"),
    )


def _read_compressed(source: TensorFolder, base: str, own: QuantizeConfig, saved: dict[str, Any]) -> Matrix:
    is_packed = format_of(own) == "pack-quantized"
    used = {f"{base}weight_scale", f"{base}weight_packed" if is_packed else f"{base}weight"}
    scales, zeros, order = source.read(f"{base}weight_scale").float(), None, None
    if not is_packed:
        codes = source.read(f"{base}weight")
    else:
        used.add(f"{base}weight_shape")
        _, inputs = source.read(f"{base}weight_shape").tolist()
        codes = unpack_words(source.read(f"{base}weight_packed"), own.bits, inputs)
    if own.weights == "float8":
        blocks = next(iter(saved["config_groups"].values()))["weights"].get("block_structure")
        scales = _scales_of_blocks(scales, codes, blocks)
    if not own.symmetric:
        used.add(f"{base}weight_zero_point")
        zeros = source.read(f"{base}weight_zero_point")
        if is_packed:
            zeros = unpack_words(zeros.t().contiguous(), own.bits, len(codes)).t()
    if f"{base}weight_g_idx" in source.names:
        used.add(f"{base}weight_g_idx")
        codes, order = _grouped(codes, source.read(f"{base}weight_g_idx"), own, base)
    return Matrix(Codes(codes, scales, zeros), order, used)


# -- gptq


def _gptq_config(saved: dict[str, Any], names: set[str], where: str) -> QuantizeConfig:
    form = str(saved.get("checkpoint_format") or saved.get("format") or "gptq").lower()
    if saved.get("bits") not in _PER_WORD or form not in ("gptq", "gptq_v2"):
        raise CheckpointError(
            f"{where}: {KEY}: GPTQ with bits {saved.get('bits')!r} in the format {form!r} is not read: "
            "only 4 and 8 bits in the formats gptq and gptq_v2."
        )
    size = int(saved.get("group_size", -1))
    head = _head(names, "qweight")
    return QuantizeConfig(f"int{saved['bits']}", max(size, 0), bool(saved.get("sym", True)), head=head)


def _read_gptq(source: TensorFolder, base: str, own: QuantizeConfig, saved: dict[str, Any]) -> Matrix:
    used = {f"{base}{name}" for name in ("qweight", "qzeros", "scales")}
    words = source.read(f"{base}qweight")
    inputs = words.shape[0] * _PER_WORD[own.bits]
    codes, order = unpack_words(words.t(), own.bits, inputs), None
    scales = source.read(f"{base}scales").float().t()
    zeros: Tensor | None = unpack_words(source.read(f"{base}qzeros"), own.bits, len(codes)).t()
    assert zeros is not None
    if str(saved.get("checkpoint_format", "gptq")).lower() != "gptq_v2":
        zeros = one_more(zeros, own.bits)
    if own.symmetric:
        if bool(zeros.any()):
            raise CheckpointError(f"{base}qzeros: zero points, and config.json says sym: true.")
        zeros = None
    if f"{base}g_idx" in source.names:
        used.add(f"{base}g_idx")
        codes, order = _grouped(codes, source.read(f"{base}g_idx"), own, base)
    return Matrix(Codes(codes, scales, zeros), order, used)


def _grouped(codes: Tensor, groups: Tensor, own: QuantizeConfig, base: str) -> tuple[Tensor, Tensor | None]:
    """Columns [out, in] with those of a group side by side, and which input each belongs to."""
    length = group_length(own, codes.shape[1])
    expected = torch.arange(codes.shape[1]) // length
    order = groups.argsort(stable=True)
    if groups.shape != expected.shape or not torch.equal(groups[order].long(), expected):
        raise CheckpointError(f"{base}g_idx: its groups do not have {length} inputs each.")
    if torch.equal(groups.long(), expected):
        return codes, None
    return codes[:, order], order.to(torch.int32)


# -- awq


def _awq_config(saved: dict[str, Any], names: set[str], where: str) -> QuantizeConfig:
    bits = saved.get("bits", saved.get("w_bit"))
    size = saved.get("group_size", saved.get("q_group_size", 128))
    version = str(saved.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not saved.get("zero_point", True):
        raise CheckpointError(
            f"{where}: {KEY}: AWQ with {bits!r} bits in the version {version!r} is not read: only 4 bits "
            "with zero points in the version gemm."
        )
    return QuantizeConfig("int4", max(int(size), 0), False, head=_head(names, "qweight"))


def _read_awq(source: TensorFolder, base: str, own: QuantizeConfig, saved: dict[str, Any]) -> Matrix:
    scales = source.read(f"{base}scales").float().t()
    codes = unpack_awq(source.read(f"{base}qweight"), len(scales)).t()
    zeros = unpack_awq(source.read(f"{base}qzeros"), len(scales)).t()
    used = {f"{base}{name}" for name in ("qweight", "qzeros", "scales")}
    return Matrix(Codes(codes, scales, zeros), None, used)


# -- fp8


def _fp8_config(saved: dict[str, Any], names: set[str], where: str) -> QuantizeConfig:
    blocks = saved.get("weight_block_size") or [0, 0]
    head = "same" if {"lm_head.weight_scale", "lm_head.weight_scale_inv"} & names else "float"
    return QuantizeConfig("float8", blocks[1], head=head)


def _read_fp8(source: TensorFolder, base: str, own: QuantizeConfig, saved: dict[str, Any]) -> Matrix:
    codes = source.read(f"{base}weight")
    if codes.dtype != FLOAT8:
        raise CheckpointError(f"{base}weight is {codes.dtype}: of float8, only e4m3 is read.")
    name = next(one for one in ("weight_scale_inv", "weight_scale") if f"{base}{one}" in source.names)
    scales = _scales_of_blocks(source.read(f"{base}{name}").float(), codes, saved.get("weight_block_size"))
    used = {f"{base}weight", f"{base}{name}"} | ({f"{base}input_scale"} & source.names)
    return Matrix(Codes(codes, scales), None, used)


def _scales_of_blocks(scales: Tensor, codes: Tensor, blocks: list[int] | None) -> Tensor:
    """Scales of a tensor, of rows or of blocks as those of groups of rows: [out, groups]."""
    if blocks:
        return scales.repeat_interleave(blocks[0], 0)[: len(codes)]
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(len(codes), 1)
    return scales.reshape(len(codes), -1)


METHODS = {
    COMPRESSED: Method(_compressed_config, _read_compressed, ("weight_scale",)),
    "gptq": Method(_gptq_config, _read_gptq, ("qweight",)),
    "awq": Method(_awq_config, _read_awq, ("qweight",)),
    "fp8": Method(_fp8_config, _read_fp8, ("weight_scale_inv", "weight_scale")),
}
