"""One row by a matrix, as a loop that reads the weights once, in the order in which they lie.

A single request decodes one row at a time, and all its work is reading weights. The sum over products is
written out; ``torch.compile`` makes of it a loop over vectors, with whatever comes after in the same pass.
It sums in float32 whatever the weights are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.generation.compiling import Kernel, compiled

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda values: values,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Product:
    """What a kernel is compiled for.

    Args:
        size: (out, in) of the matrix.
        dtype: of the weights and rows.
        has_bias: whether there is one.
        activation: key of :data:`ACTIVATIONS`.
        other: ``"plus"`` or ``"times"`` something, or ``None``.
    """

    size: tuple[int, int]
    dtype: torch.dtype
    has_bias: bool
    activation: str | None = None
    other: str | None = None


def row_product(
    row: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    beside: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    is_sum: bool,
) -> Tensor:
    """activation(row · Wᵀ + b), plus or times ``beside``.

    Args:
        row: [1, in].
        weight: [out, in].
        bias: [out].
        beside: [1, out].
        activation: applied in float32.
        is_sum: whether ``beside`` is added.

    Returns:
        [1, out]
    """
    found = (weight.float() * row.float()).sum(-1)
    if bias is not None:
        found = found + bias.float()
    found = activation(found)
    if beside is not None:
        found = found + beside[0].float() if is_sum else found * beside[0].float()
    return found.to(row.dtype)[None]


_KERNELS: dict[Product, Kernel] = {}
_LOCK = threading.Lock()


@torch.inference_mode()
def compiled_product(product: Product) -> Kernel:
    """The kernel ``(row, weight, bias, beside)``, made once in a process; takes a second or two.

    Raises:
        Exception: whatever the compiler finds missing, first of all a C++ compiler.
    """
    with _LOCK:
        if product not in _KERNELS:
            _KERNELS[product] = _make(product)
        return _KERNELS[product]


def _make(product: Product) -> Kernel:
    activation, is_sum = ACTIVATIONS[product.activation], product.other == "plus"
    outputs, inputs = product.size
    sizes = [(1, inputs), (outputs, inputs)]
    sizes += [(outputs,)] * product.has_bias + [(1, outputs)] * (product.other is not None)

    def one(row: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        given = list(others)
        bias = given.pop(0) if product.has_bias else None
        return row_product(row, weight, bias, given[0] if given else None, activation, is_sum)

    examples = [torch.zeros(size, dtype=product.dtype) for size in sizes]
    kernel = compiled(one, examples, [()] * len(sizes))
    if product.has_bias and product.other is not None:
        return kernel
    if product.has_bias:
        return lambda row, weight, bias, _beside: kernel(row, weight, bias)
    if product.other is not None:
        return lambda row, weight, _bias, beside: kernel(row, weight, beside)
    return lambda row, weight, _bias, _beside: kernel(row, weight)
