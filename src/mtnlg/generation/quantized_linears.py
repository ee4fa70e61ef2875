"""Matrix products of quantized layers in generation.

Kernels (:mod:`~mtnlg.generation.integer_kernel`) read the codes as they are, half or a quarter of what bf16
reads: for layers whose activations are rounded too (``activations: int8``) a product of integers, for all
others one of floating point. Where a kernel cannot be had, and for float8, products run over the matrix
that the codes stand for, laid out like any other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.generation.huge_pages import use_huge_pages
from mtnlg.generation.integer_kernel import FLOAT_KERNEL, KERNEL, Call, MatrixOfCodes
from mtnlg.generation.linears import Activations, Linear, make_linear
from mtnlg.generation.native import NativeKernel
from mtnlg.generation.tiled_linear import ACTIVATIONS
from mtnlg.quantization import QuantizedLinear
from mtnlg.quantization.linear import rounded_activations
from mtnlg.quantization.numbers import Codes

TILE = 32  # outputs
INPUTS_OF_A_VECTOR = 8  # two times four
ROW_TYPES = (torch.float32, torch.bfloat16)


def kernel_of(module: object) -> NativeKernel | None:
    """The kernel that is made for such a layer; ``None`` where there is none."""
    if not isinstance(module, QuantizedLinear) or module.config.weights not in ("int8", "int4"):
        return None
    is_cut_evenly = module.num_groups == 1 or module.group_length % INPUTS_OF_A_VECTOR == 0
    if not is_cut_evenly or module.codes.device.type != "cpu":
        return None
    return KERNEL if module.config.activations == "int8" else FLOAT_KERNEL


def have_kernel_for(model: nn.Module) -> bool:
    """Load the kernels that the model has layers for; whether all its matrices go through them."""
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, QuantizedLinear))]
    kernels = [kernel_of(linear) for linear in linears]
    loaded = [kernel is not None and kernel.load() is not None for kernel in kernels]
    return bool(loaded) and all(loaded)


class CodesLinear:
    """A linear layer over codes, as the kernels read them (:class:`~mtnlg.generation.linears.Linear`).

    Args:
        codes: [out, in] and what belongs to them, of one layer or several side by side.
        length: inputs of a group.
        is_int4: whether codes have four bits.
        bias: [out].
        kernel: as one of :mod:`~mtnlg.generation.integer_kernel` is loaded.
        order: [in] the input that each column of codes belongs to; ``None`` is their own order.

    Attributes:
        matrix: what the kernel is told of it.
        space: bytes that the kernel wants for each row.
    """

    def __init__(
        self,
        codes: Codes,
        length: int,
        is_int4: bool,
        bias: Tensor | None,
        kernel: Any,
        order: Tensor | None = None,
    ) -> None:
        self.kernel, self.order = kernel, order
        self.outputs, self.inputs = codes.codes.shape
        self.groups = codes.scales.shape[1]
        self.group = -(-length // INPUTS_OF_A_VECTOR) * INPUTS_OF_A_VECTOR
        self.codes = tiled_codes(codes.codes, self.groups * self.group, is_int4)
        scales = _tiled(codes.scales)
        is_short = self.groups > 1 and torch.equal(scales.bfloat16().float(), scales)
        self.scales = scales.bfloat16() if is_short else scales
        middle = 8 if is_int4 else 128
        zeros = codes.zeros
        self.zeros = None if zeros is None else _tiled((zeros.to(torch.int16) + middle).to(torch.uint8))
        self.bias = None if bias is None else bias.float().contiguous()
        self.num_bytes = sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)
        use_huge_pages(self.codes.data_ptr(), self.codes.nbytes)
        places = [
            None if t is None else t.data_ptr() for t in (self.codes, self.scales, self.zeros, self.bias)
        ]
        sizes = self.outputs, self.inputs, self.groups, self.group
        self.matrix = MatrixOfCodes(*places, *sizes, is_int4, is_short)
        self.space = 4 * (self.groups * self.group + self.groups + 1)

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~mtnlg.generation.linears.Linear`."""
        other = plus if times is None else times
        rows = rows.contiguous() if self.order is None else rows.index_select(1, self.order)
        found = rows.new_empty(rows.shape[0], self.outputs)
        if other is not None:
            other = other.contiguous()
        space = torch.empty(len(rows) * self.space, dtype=torch.uint8)
        places = rows.data_ptr(), found.data_ptr(), None if other is None else other.data_ptr()
        how = ACTIVATIONS[activation], plus is not None, rows.dtype == torch.bfloat16
        call = Call(*places, space.data_ptr(), rows.shape[0], *how)
        self.kernel(ctypes.byref(self.matrix), ctypes.byref(call), torch.get_num_threads())
        return found


class RoundedLinear:
    """Rows rounded to 8 bits before a product that is not of integers.

    Args:
        inner: the product.
    """

    def __init__(self, inner: Linear) -> None:
        self.inner, self.num_bytes = inner, inner.num_bytes

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`~mtnlg.generation.linears.Linear`."""
        return self.inner(rounded_activations(rows), activation, plus, times)


def make_quantized_linear(
    modules: Sequence[QuantizedLinear],
    dtype: torch.dtype,
    activations: Activations,
    in_tiles: bool = False,
) -> Linear:
    """One product that gives the outputs of several quantized layers side by side.

    Args:
        modules: the layers, of one config.
        dtype: of rows and outputs.
        activations: functions by name.
        in_tiles: see :func:`~mtnlg.generation.linears.make_linear`.
    """
    biases = [None if module.bias is None else module.bias.detach() for module in modules]
    kernel = kernel_of(modules[0])
    is_alike = all(kernel_of(module) is kernel and _in_order_of(module, modules[0]) for module in modules)
    if kernel is not None and kernel.loaded is not None and is_alike and dtype in ROW_TYPES:
        given = [bias for bias in biases if bias is not None]
        is_int4 = modules[0].config.weights == "int4"
        bias = torch.cat(given) if given else None
        length, codes = modules[0].group_length, _side_by_side(modules)
        return CodesLinear(codes, length, is_int4, bias, kernel.loaded, modules[0].order)
    weights = [module.dequantize().to(dtype) for module in modules]
    inner = make_linear(weights, biases, dtype, activations, in_tiles)
    return RoundedLinear(inner) if modules[0].config.activations == "int8" else inner


def _in_order_of(module: QuantizedLinear, other: QuantizedLinear) -> bool:
    """Whether the columns of both lie alike."""
    if module.order is None or other.order is None:
        return module.order is other.order
    return torch.equal(module.order, other.order)


def _side_by_side(modules: Sequence[QuantizedLinear]) -> Codes:
    parts = [module.unpacked() for module in modules]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def tiled_codes(codes: Tensor, padded: int, is_int4: bool) -> Tensor:
    """Codes in the order in which the kernel reads them.

    Args:
        codes: [out, in] int8.
        padded: inputs, filled up with codes of zero.
        is_int4: two to a byte.

    Returns:
        uint8 [tiles, padded / 4, 2, 16, 4], or with int4 [tiles, padded / 8, 2, 16, 4]
    """
    outputs, inputs = codes.shape
    filled = F.pad(codes, (0, padded - inputs, 0, -outputs % TILE)).to(torch.int16)
    unsigned = (filled + (8 if is_int4 else 128)).to(torch.uint8)
    fours = unsigned.view(-1, 2, 16, padded // 4, 4)  # [tiles, 2, 16, fours, 4]
    if not is_int4:
        return fours.permute(0, 3, 1, 2, 4).contiguous()
    low, high = fours[:, :, :, 0::2], fours[:, :, :, 1::2]
    return (low | (high << 4)).permute(0, 3, 1, 2, 4).contiguous()


def _tiled(values: Tensor) -> Tensor:
    """[out, groups] → [tiles, groups, 32]"""
    filled = F.pad(values, (0, 0, 0, -values.shape[0] % TILE))
    return filled.view(-1, TILE, values.shape[1]).transpose(1, 2).contiguous()
