"""What tells one model's weights from another's in 33 characters, so that an adapter knows its base.

Of each parameter 64 numbers, rounded to bf16, are hashed: a model read in another precision is the same,
one trained further is not. The first half is that of embedding, norms and other parameters that
quantization leaves alone; the second that of all matrices, or ``quantized``, which fits any.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mtnlg.config.errors import CheckpointError
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import is_of_adapter

SAMPLED = 64  # numbers of each parameter
QUANTIZED = "quantized"
_NOT_TRAINED = ".selection_bias"  # a buffer, which balancing moves
_LINEAR = (".attention.", ".cross_attention.", ".mlp.", "head.output.")


def fingerprint_of(decoder: MegatronLmDecoder) -> str:
    """Of a whole plain model; an adapter in it does not count."""
    tensors = {name: item for name, item in decoder.named_parameters() if not is_of_adapter(name)}
    is_quantized = any(name.endswith(".codes") for name, _ in decoder.named_buffers())
    return fingerprint(tensors.items(), is_quantized)


def fingerprint(tensors: Iterable[tuple[str, Tensor]], is_quantized: bool = False) -> str:
    """Of parameters by name, whole, in any order and one at a time; a tied head does not come."""
    found = {name: _digest(name, tensor) for name, tensor in tensors if not name.endswith(_NOT_TRAINED)}
    ends = {name: digest for name, digest in found.items() if not _is_of_linear(name)}
    layers = {name: digest for name, digest in found.items() if _is_of_linear(name)}
    return f"{_together(ends)}-{QUANTIZED if is_quantized else _together(layers)}"


def check_base(adapter: str | None, base: str, where: str) -> None:
    """Refuse an adapter that was made for another base.

    Args:
        adapter: fingerprint that the adapter names; ``None`` names none, and fits where shapes do.
        base: fingerprint of the model.
        where: the adapter, for the error.

    Raises:
        CheckpointError: they differ.
    """
    if adapter is None:
        return
    pairs = list(zip(adapter.split("-"), base.split("-")))
    if not all(QUANTIZED in pair or pair[0] == pair[1] for pair in pairs):
        raise CheckpointError(
            f"{where}: the adapter was made for another base model (its fingerprint is {adapter}, the "
            f"model's {base}). Take the model it was tuned on; adapter_config.json names it."
        )


def _is_of_linear(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name and any(part in f".{name}" for part in _LINEAR)


def _digest(name: str, tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    numbers = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().bfloat16()
    told = f"{name} {list(tensor.shape)} ".encode()
    return hashlib.blake2b(
        told + numbers.cpu().view(torch.int16).numpy().tobytes(), digest_size=16
    ).digest()


def _together(digests: Mapping[str, bytes]) -> str:
    content = b"".join(digests[name] for name in sorted(digests))
    return hashlib.blake2b(content, digest_size=8).hexdigest()
