"""Files of ``torch.save``, read without running anything that they say.

torch's ``weights_only`` loader builds tensors and plain containers and refuses every other name in the
pickle. What Megatron and DeepSpeed put beside the weights (their options, loss scalers, enumerations) is
built as inert records instead; a name of any other module is refused.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mtnlg.config import CheckpointError
from mtnlg.interop.lazy_tensor import LazyTensor, lazy

_INERT = (
    *("megatron.", "deepspeed.", "transformer_engine.", "apex.", "fairscale."),
    *("numpy.", "pathlib.", "types.SimpleNamespace", "signal.Signals", "torch.nn.functional."),
    *("torch._C._nn.", "torch.distributed.", "enum.", "functools.partial", "collections.deque"),
)


class Record:
    """Stands for an object of somebody else's class: holds what was saved, does nothing."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments
        self.__dict__.update(named)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.__dict__.get('arguments', ())}"


def read_torch_file(path: Path) -> Any:
    """What a file of ``torch.save`` holds; tensors stay on the disk until they are used.

    Raises:
        CheckpointError: the file is missing or damaged, or names things that it has no business to name.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing.")
    is_zip = zipfile.is_zipfile(path)
    try:
        names = get_unsafe_globals_in_checkpoint(path) if is_zip else []
        refused = [name for name in names if name != "argparse.Namespace" and not name.startswith(_INERT)]
        if refused:
            raise _refusal(path, sorted(refused)[:4])
        records: list[Any] = [(type(name.rsplit(".", 1)[1], (Record,), {}), name) for name in names]
        with safe_globals([argparse.Namespace, *records]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        if named := re.search(r"GLOBAL (\S+)", str(error)):  # torch's words go on with dangerous advice
            raise _refusal(path, [named[1].rstrip(".,")]) from None
        raise CheckpointError(f"{path}: cannot be read: damaged, or no file of torch.save.") from None


def _refusal(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: its pickle names {', '.join(names)}, which could run code, so it is not opened."
    )


class InMemory:
    """A tensor that is here, or mapped from its file by torch."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self, view: Tensor) -> Tensor:
        """See :class:`~mtnlg.interop.lazy_tensor.Source`."""
        whole = self.tensor.contiguous()
        place = whole.storage_offset() + view.storage_offset()
        return whole.as_strided(view.shape, view.stride(), place).clone()


def as_lazy(tensor: Tensor) -> LazyTensor:
    """A tensor of which only what is used will be copied."""
    return lazy(InMemory(tensor.detach()), tensor.shape, tensor.dtype)
