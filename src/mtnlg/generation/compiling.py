"""From a function of tensors to one compiled kernel that asks nothing at a call.

``torch.compile`` checks at every call whether what it was made for still holds, which takes 15 to 60
microseconds; a decoding step calls a hundred kernels of as little work. Here the sizes that may change are
named once, and what comes out is the compiler's product itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Tensor]
_OPTIONS = {"assert_indirect_indexing": False}  # page numbers come from our own books


def compiled(
    function: Callable[..., Tensor], examples: Sequence[Tensor], dynamic: Sequence[Collection[int]]
) -> Kernel:
    """``function`` as one kernel; takes seconds, most of it in the C++ compiler.

    What it does must not depend on the numbers in its arguments, and of their sizes only on those that
    are not named in ``dynamic``. It may write into its arguments.

    Args:
        function: of tensors.
        examples: one argument each; sizes that may change are all different and above 1.
        dynamic: the axes of each whose size may change.

    Raises:
        Exception: whatever the compiler finds missing, first of all a C++ compiler.
    """
    # Here, and not above: the compiler is as large as the rest of torch, and seldom needed.
    from torch._inductor import standalone_compile
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with torch.inference_mode(False), torch.no_grad():
        shapes: list[Any] = [
            mode.from_tensor(example.clone(), symbolic_context=_symbols(example, axes))
            for example, axes in zip(examples, dynamic, strict=True)
        ]
        with mode:
            graph = make_fx(function, _allow_non_fake_inputs=True)(*shapes)
        return standalone_compile(graph, shapes, options={"config_patches": _OPTIONS})


def _symbols(example: Tensor, axes: Collection[int]) -> Any:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(example.dim())]
    return StatelessSymbolicContext(dynamic_sizes=sizes)
