"""Quantized matrices below an adapter, divided over tensor-parallel ranks: QLoRA.

Each rank rounds a whole matrix as one process does and keeps the codes of its part, so that every layout
computes with the same numbers. Where the cut goes through groups of inputs that share a scale, a rank's
groups are shorter and say the scale more than once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mtnlg.config.quantize import QuantizeConfig
from mtnlg.model import MegatronLmDecoder
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.tensor import COLUMN, ROW, head_linear, local_weight, row_linear
from mtnlg.quantization import QuantizedLinear
from mtnlg.quantization.model import linears_to_quantize, set_module
from mtnlg.quantization.numbers import Codes, group_length, quantize


@dataclass(frozen=True)
class Part:
    """What of a quantized matrix a rank holds.

    Args:
        shape: of the whole matrix, (out, in).
        rows: its outputs.
        columns: its inputs.
        length: inputs of the whole matrix that share a scale.
        own_length: likewise, of this part.
        group: ranks that have the other parts.
        is_by_inputs: whether each has other inputs.
    """

    shape: tuple[int, int]
    rows: slice
    columns: slice
    length: int
    own_length: int
    group: dist.ProcessGroup
    is_by_inputs: bool

    def of(self, codes: Codes) -> Codes:
        """This part of a whole matrix's codes."""
        groups = slice(self.columns.start // self.own_length, -(-self.columns.stop // self.own_length))

        def by_group(values: Tensor) -> Tensor:
            repeated = values.repeat_interleave(self.length // self.own_length, dim=1)
            return repeated[self.rows, groups].contiguous()

        zeros = None if codes.zeros is None else by_group(codes.zeros)
        return Codes(codes.codes[self.rows, self.columns].contiguous(), by_group(codes.scales), zeros)


def quantize_divided(decoder: MegatronLmDecoder, config: QuantizeConfig, mesh: Mesh) -> None:
    """Exchange the linear layers of divided layers, on meta, for quantized ones of this rank's part."""
    axis = TensorAxis(mesh.axis("tensor"), mesh.layout.sequence_parallel)
    for name, linear in list(linears_to_quantize(decoder.layers)):
        made, forward = _part_of(linear, config, axis), linear.forward
        assert isinstance(forward, partial)
        if forward.func is row_linear:
            made.forward = partial(row_quantized, made, axis, made.product)  # type: ignore[method-assign]
        else:
            made.forward = partial(_local_quantized, made, _bias_rows(forward))  # type: ignore[method-assign]
        set_module(decoder.layers, name, made)


def _part_of(linear: nn.Linear, config: QuantizeConfig, axis: TensorAxis) -> QuantizedLinear:
    weight = linear.weight
    assert isinstance(weight, DTensor)
    inputs, outputs = weight.shape[1], weight.shape[0]
    placement, rows, columns = weight.placements[0], slice(0, outputs), slice(0, inputs)
    if placement == COLUMN:
        rows = _own(outputs, axis)
    elif placement == ROW:
        columns = _own(inputs, axis)
    else:
        rows = _bias_rows(linear.forward) or rows
    length, width = group_length(config, inputs), columns.stop - columns.start
    own_length = length if width == inputs else math.gcd(length, width)
    made = QuantizedLinear(
        width, rows.stop - rows.start, config, linear.bias, torch.device("meta"), weight.dtype
    )
    made.group_length = own_length
    group, sizes = axis.mesh.get_group(), (outputs, inputs)
    part = Part(sizes, rows, columns, length, own_length, group, placement == ROW)
    made.part = part  # type: ignore[assignment]
    return made


def _own(count: int, axis: TensorAxis) -> slice:
    largest = -(-count // axis.size)  # as ``torch.chunk`` cuts
    return slice(min(count, axis.rank * largest), min(count, (axis.rank + 1) * largest))


def _bias_rows(forward: Callable[..., Tensor]) -> slice | None:
    """Where ranks share a head, the rows of the one that is computed here."""
    is_of_head = isinstance(forward, partial) and forward.func is head_linear
    return forward.args[2] if is_of_head else None  # type: ignore[attr-defined]


def row_quantized(
    linear: nn.Module, axis: TensorAxis, product: Callable[[Tensor], Tensor], inputs: Tensor
) -> Tensor:
    """Each rank's share of the product, their sum, the bias once."""
    output, bias = axis.leave(product(inputs)), linear.bias
    return output if bias is None else output + local_weight(bias, axis.stream_gradient)  # type: ignore[arg-type]


def _local_quantized(linear: QuantizedLinear, rows: slice | None, inputs: Tensor) -> Tensor:
    output = linear.product(inputs)
    if linear.bias is None:
        return output
    bias = local_weight(linear.bias)
    return output + (bias if rows is None else bias[rows])


def set_whole_matrix(linear: QuantizedLinear, whole: Tensor) -> None:
    """Round the matrix [out, in] and keep what this rank computes with."""
    codes, part = quantize(whole, linear.config), part_of(linear)
    linear.set_codes(codes if part is None else part.of(codes))


def part_of(linear: nn.Module) -> Part | None:
    """Which part of a quantized matrix this rank has; ``None`` is all of it."""
    found: Any = getattr(linear, "part", None)
    return found if isinstance(found, Part) else None


def whole_row_norms(linear: QuantizedLinear) -> Tensor:
    """Lengths of the rows of the whole matrix, [out]; all its ranks call this."""
    squares, part = linear.dequantize().square().sum(dim=1), part_of(linear)
    if part is None:
        return squares.sqrt()
    if part.is_by_inputs:
        dist.all_reduce(squares, group=part.group)
        return squares.sqrt()
    whole = squares.new_zeros(part.shape[0])
    whole[part.rows] = squares
    dist.all_reduce(whole, dist.ReduceOp.MAX, group=part.group)  # ranks may have the same head
    return whole.sqrt()
