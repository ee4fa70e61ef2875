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
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[..., Tensor]
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
        if product in _KERNELS:
            return _KERNELS[product]
        activation, is_sum = ACTIVATIONS[product.activation], product.other == "plus"

        def one(row: Tensor, weight: Tensor, bias: Tensor | None, beside: Tensor | None) -> Tensor:
            return row_product(row, weight, bias, beside, activation, is_sum)

        # A name of its own for each, so that the compiler has nothing to ask at a call.
        code = one.__code__.replace(co_name=f"row_product_{len(_KERNELS)}")
        function = FunctionType(code, one.__globals__, closure=one.__closure__)
        kernel: Kernel = torch.compile(
            function,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        outputs, inputs = product.size
        row = torch.zeros(1, inputs, dtype=product.dtype)
        weight = torch.zeros(outputs, inputs, dtype=product.dtype)
        bias = torch.zeros(outputs, dtype=product.dtype) if product.has_bias else None
        beside = torch.zeros(1, outputs, dtype=product.dtype) if product.other else None
        kernel(row, weight, bias, beside)
        _KERNELS[product] = kernel
        return kernel
