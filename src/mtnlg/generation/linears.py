"""Matrix products of generation: weights laid out once in the order in which the processor reads them.

``F.linear`` reads plain weights at a third of what memory gives when there are few rows. Where our own
kernel runs, it does all products (:mod:`~mtnlg.generation.tiled_linear`). Elsewhere oneDNN, which torch
ships, reads weights that it packed before at two thirds, from four rows on; with fewer, rows of zeros are
added, which costs nothing because reading the weights is all the work. The products of a row do not depend
on the rows beside it, nor on their number (with oneDNN from two on): tests/generation hold it to that.
docs/generation-speed.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.huge_pages import LATER
from mtnlg.generation.tiled_linear import TiledLinear, can_tile

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

Activations = dict[str, Callable[[Tensor], Tensor]]


class Linear(Protocol):
    """Rows by a matrix, with what comes right after it.

    Attributes:
        num_bytes: memory of its own, beside the model's.
    """

    num_bytes: int

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
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        # Looked up once: a step calls them hundreds of times.
        self._plain = torch.ops.mkldnn._linear_pointwise.default
        self._with_other = torch.ops.mkldnn._linear_pointwise.binary
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
        self.bias = bias
        self.num_bytes = weight.nbytes
        place = torch.ops.mkldnn.data_ptr(self.weight), torch.ops.mkldnn._nbytes(self.weight)
        LATER.add(self.weight, *place)

    def __call__(
        self,
        rows: Tensor,
        activation: str | None = None,
        plus: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Linear`."""
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
        activations: Activations,
        is_copy: bool,
    ) -> None:
        self.weight, self.bias, self.activations = weight, bias, activations
        self.num_bytes = weight.nbytes * is_copy

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


def fewest_rows(device: torch.device, dtype: torch.dtype, in_tiles: bool = False) -> int:
    """How many rows a step should have at least (see :func:`make_linear`)."""
    is_packed = can_pack(device, dtype) and not (in_tiles and can_tile(device, dtype))
    return FEWEST_ROWS if is_packed else 1


def make_linear(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    activations: Activations,
    in_tiles: bool = False,
) -> Linear:
    """One linear layer that gives the outputs of several side by side.

    Args:
        weights: each [out, in].
        biases: of each; all or none.
        dtype: to compute in.
        activations: functions by name.
        in_tiles: by our own kernel (:mod:`~mtnlg.generation.tiled_linear`), where it runs.
    """
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    given = [bias for bias in biases if bias is not None]
    bias = torch.cat(given).to(dtype) if given else None
    laid_out = weight.to(dtype)
    if in_tiles and can_tile(laid_out.device, dtype):
        return TiledLinear(laid_out, bias)
    if can_pack(laid_out.device, dtype):
        return PackedLinear(laid_out, bias)
    return PlainLinear(laid_out, bias, activations, laid_out is not weights[0])
