"""Number formats: weights, gradients and optimizer state are float32, products run in the config's.

The laid-out model holds the 16-bit working copy (``parallel/working_copy.py``, or over replicas
``parallel/replicas.py``; where FSDP frees weights it casts as it gathers). What is left to say here is
which dtype's peak a step is measured against.
"""

from __future__ import annotations

import torch

COMPUTE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compute_dtype(name: str) -> torch.dtype:
    """The dtype of the matrix products for ``precision.dtype``."""
    return COMPUTE_DTYPES[name]
