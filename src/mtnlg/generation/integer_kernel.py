"""The product of rows and integer codes (``kernels/integer_product.cpp``).

torch's own kernels for few bits read weights at a third to a half of what memory gives, keep one scale for
a whole tensor of activations, or know no groups: docs/quantization.md has the measurements. This one needs
a processor with AVX-512 VNNI; without it the layers compute the same over weights that were made floating
point again.
"""

from __future__ import annotations

import ctypes

from mtnlg.generation.native import NativeKernel

_POINTER, _INTEGER = ctypes.c_void_p, ctypes.c_int64
KERNEL = NativeKernel(
    "integer_product.cpp",
    "mtnlg_integer_product",
    [*[_POINTER] * 3, _INTEGER, *[_POINTER] * 4, *[_INTEGER] * 6],
    ["avx512_vnni"],
)
