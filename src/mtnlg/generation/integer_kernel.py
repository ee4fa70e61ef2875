"""Products of rows and codes (``kernels/integer_product.cpp``, ``kernels/float_product.cpp``).

torch's own kernels for few bits read weights at a third to a half of what memory gives, keep one scale for
a whole tensor of activations, or know no groups: docs/quantization.md has the measurements. These need a
processor with AVX-512, and VNNI for integers; without it the layers compute the same over weights that
were made floating point again.
"""

from __future__ import annotations

import ctypes

from mtnlg.generation.native import NativeKernel

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64


class MatrixOfCodes(ctypes.Structure):
    """``Matrix`` in ``kernels/quantized_matrix.h``."""

    _fields_ = (
        *((name, _POINTER) for name in ("codes", "scales", "zeros", "bias")),
        *(
            (name, _INTEGER)
            for name in ("outputs", "inputs", "groups", "group", "is_int4", "has_bf16_scales")
        ),
    )


class Call(ctypes.Structure):
    """``Call`` in ``kernels/call.h``."""

    _fields_ = (
        *((name, _POINTER) for name in ("inputs", "values", "other", "space")),
        *((name, _INTEGER) for name in ("rows", "activation", "is_sum", "is_bf16")),
    )


_ARGUMENTS = [_POINTER, _POINTER, _INTEGER]
KERNEL = NativeKernel("integer_product.cpp", "mtnlg_integer_product", _ARGUMENTS, ["avx512_vnni"])
FLOAT_KERNEL = NativeKernel(
    "float_product.cpp", "mtnlg_float_product", _ARGUMENTS, ["avx512f", "avx512bw", "avx512vl"]
)
