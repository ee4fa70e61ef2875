"""Matrix products of generation: weights laid out once in the order in which the processor reads them.

``F.linear`` reads plain weights at a third of what memory gives when there are few rows. oneDNN, which
torch ships, reads weights that it packed before at nearly all of it, from four rows on; with fewer, rows
of zeros are added, which costs nothing because reading the weights is all the work. The products of a row
do not depend on the rows beside it, nor on their number (from two on): tests/generation hold it to that.
docs/generation-speed.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.huge_pages import use_huge_pages
from mtnlg.generation.row_products import Kernel, Product, compiled_product

# Rows for which oneDNN is asked to lay the weights out; the same layout then serves any number. Measured
# for 1 to 128 rows on AVX-512: float32 is fastest with this, bf16 does not care.
PACKED_FOR_ROWS = 4
FEWEST_ROWS = 4  # one row takes longer than four: 1.1 times in bf16, 1.2 to 1.4 times in float32

# name of the activation → oneDNN's name and its variant
ONEDNN_ACTIVATIONS = {
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}


class Linear(Protocol):
    """Rows by a matrix, with what comes right after it.

    Attributes:
        num_bytes: memory of its own, beside the model's.
    """

    num_bytes: int

    def compile_row(self, activation: str | None = None, other: str | None = None) -> None:
        """Have a kernel made for single rows, where that is worth something.

        Args:
            activation: see :meth:`__call__`.
            other: ``"plus"``, ``"times"`` or ``None``.
        """

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """activation(rows · Wᵀ + b), or ``rows · Wᵀ + b`` plus or times another [rows, out].

        Args:
            rows: [rows, in].
            activation: key of :data:`ONEDNN_ACTIVATIONS`.
            plus: [rows, out].
            times: [rows, out].
        """


class PackedLinear:
    """A linear layer over a packed copy of its weights.

    Args:
        weight: [out, in].
        bias: [out].
        keeps_rows: keep the weights as they are too, for :mod:`~mtnlg.generation.row_products`.
        is_copy: the weights are not the model's own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, keeps_rows: bool = False, is_copy: bool = True
    ) -> None:
        # Looked up once: a step calls them hundreds of times.
        self._plain = torch.ops.mkldnn._linear_pointwise.default
        self._with_other = torch.ops.mkldnn._linear_pointwise.binary
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self.bias = bias
        self.num_bytes = weight.nbytes * (2 if keeps_rows and is_copy else 1)
        self._plain_weight = weight.contiguous() if keeps_rows else None
        use_huge_pages(torch.ops.mkldnn.data_ptr(self.weight), torch.ops.mkldnn._nbytes(self.weight))
        if self._plain_weight is not None:
            use_huge_pages(self._plain_weight.data_ptr(), self._plain_weight.nbytes)
        self._row_kernels: dict[tuple[str | None, str | None], Kernel] = {}

    def compile_row(self, activation: str | None = None, other: str | None = None) -> None:
        """See :class:`Linear`."""
        if self._plain_weight is None:
            return
        outputs, inputs = self._plain_weight.shape
        has_bias = self.bias is not None
        product = Product((outputs, inputs), self._plain_weight.dtype, has_bias, activation, other)
        self._row_kernels[activation, other] = compiled_product(product)

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Linear`."""
        if self._row_kernels and rows.shape[0] == 1:
            other = None if plus is None and times is None else "times" if plus is None else "plus"
            kernel = self._row_kernels.get((activation, other))
            if kernel is not None:
                return kernel(rows, self._plain_weight, self.bias, times if plus is None else plus)
        if plus is not None:
            return self._with_other(rows, plus, self.weight, self.bias, "add")
        if times is not None:
            return self._with_other(rows, times, self.weight, self.bias, "mul")
        name, variant = ("none", "") if activation is None else ONEDNN_ACTIVATIONS[activation]
        return self._plain(rows, self.weight, self.bias, name, [], variant)


class PlainLinear:
    """A linear layer over the weights as they are: for GPUs, and where oneDNN is not there.

    Args:
        weight: [out, in].
        bias: [out].
        activations: functions by name.
        is_copy: the weights are not the model's own.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activations: dict[str, Callable[[Tensor], Tensor]],
        is_copy: bool,
    ) -> None:
        self.weight, self.bias, self.activations = weight, bias, activations
        self.num_bytes = weight.nbytes * is_copy

    def compile_row(self, activation: str | None = None, other: str | None = None) -> None:
        """Nothing to gain: the library's own product reads plain weights well here."""

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Linear`."""
        product = F.linear(rows, self.weight, self.bias)
        if plus is not None:
            return product + plus
        if times is not None:
            return product * times
        return product if activation is None else self.activations[activation](product)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :class:`PackedLinear` works here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def fewest_rows(device: torch.device, dtype: torch.dtype) -> int:
    """How many rows a step should have at least."""
    return FEWEST_ROWS if can_pack(device, dtype) else 1


def make_linear(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    activations: dict[str, Callable[[Tensor], Tensor]],
    keeps_rows: bool = False,
) -> Linear:
    """One linear layer that gives the outputs of several side by side.

    Args:
        weights: each [out, in].
        biases: of each; all or none.
        dtype: to compute in.
        activations: functions by name.
        keeps_rows: see :class:`PackedLinear`.
    """
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    given = [bias for bias in biases if bias is not None]
    bias = torch.cat(given).to(dtype) if given else None
    laid_out = weight.to(dtype)
    if can_pack(laid_out.device, dtype):
        return PackedLinear(laid_out, bias, keeps_rows, laid_out is not weights[0])
    return PlainLinear(laid_out, bias, activations, laid_out is not weights[0])
