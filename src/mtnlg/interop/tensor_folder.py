"""Named tensors in a folder of safetensors files: whole, sharded by name, or sharded by slice."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtnlg.config import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SLICES_KEY = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's note of where a slice belongs


@dataclass
class _Part:
    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class _Entry:
    parts: list[_Part] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        ends = ([o + s for o, s in zip(part.offsets, part.shape)] for part in self.parts)
        return tuple(max(axis) for axis in zip(*ends))


class TensorFolder:
    """Reads tensors by name, one at a time, from safetensors files.

    A tensor may lie in one file or, as a distributed checkpoint writes it, in slices over several;
    slices are put together on reading. Pickle files are never opened: they can run code.

    Args:
        files: the safetensors files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            self._add(file)

    @classmethod
    def of_hugging_face(cls, folder: Path) -> TensorFolder:
        """``model.safetensors``, or the shards that ``model.safetensors.index.json`` names."""
        index = folder / INDEX_NAME
        if (folder / SINGLE_NAME).is_file():
            return cls([folder / SINGLE_NAME])
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: not a safetensors index ({error}).") from None
            return cls([folder / Path(name).name for name in names])
        return cls.of_folder(folder)

    @classmethod
    def of_folder(cls, folder: Path) -> TensorFolder:
        """Every safetensors file that lies in ``folder``."""
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return cls(files)
        pickles = (
            sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES) if folder.is_dir() else []
        )
        if pickles:
            raise CheckpointError(
                f"{folder}: the weights are pickle files ({pickles[0]}), which can run any code on "
                "loading, so they are never opened. Ask for safetensors, or convert them where you "
                "trust them (transformers: model.save_pretrained(folder))."
            )
        raise CheckpointError(f"{folder}: no .safetensors file there.")

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole shape of tensor ``name``."""
        return self._entries[name].shape

    def read(self, name: str) -> Tensor:
        """The whole tensor ``name``, in memory of its own on the CPU.

        Raises:
            CheckpointError: slices are missing.
        """
        entry = self._entries[name]
        if (
            len(entry.parts) == 1
            and entry.parts[0].shape == entry.shape
            and not any(entry.parts[0].offsets)
        ):
            return self._read_part(name, entry.parts[0]).clone()
        whole: Tensor | None = None
        covered: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        for part in entry.parts:
            tensor = self._read_part(name, part)
            whole = tensor.new_empty(entry.shape) if whole is None else whole
            place = tuple(slice(o, o + s) for o, s in zip(part.offsets, part.shape))
            whole[place] = tensor
            covered.add((part.offsets, part.shape))
        present = sum(torch.Size(shape).numel() for _, shape in covered)
        if whole is None or present != whole.numel():
            files = ", ".join(sorted({part.file.name for part in entry.parts}))
            raise CheckpointError(f"tensor {name}: slices are missing, only those in {files} are here.")
        return whole

    def _read_part(self, name: str, part: _Part) -> Tensor:
        with _open(part.file) as file:
            return file.get_tensor(name)

    def _add(self, path: Path) -> None:
        with _open(path) as file:
            notes = json.loads((file.metadata() or {}).get(_SLICES_KEY, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a dict
                shape = tuple(file.get_slice(name).get_shape())
                offsets = tuple(notes.get(name, {}).get("saved_offsets", [0] * len(shape)))
                self._entries.setdefault(name, _Entry()).parts.append(_Part(path, offsets, shape))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: the file is missing.")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file ({error}).") from None


def write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write tensors as Hugging Face does: one file, or numbered shards with an index.

    At most one shard is in memory beside the source. Files come into being under temporary names;
    only when all are complete do they take their places, so a full disk leaves what was there.

    Args:
        folder: existing folder.
        tensors: names and tensors, consumed once.
        max_shard_bytes: largest file, a single larger tensor excepted.

    Returns:
        The files written, the index last if there is one.

    Raises:
        CheckpointError: the disk refused (full, read-only, ...).
    """
    shards: list[list[str]] = []
    total = 0
    try:
        for shard in _shards(tensors, max_shard_bytes):
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
            save_file(contiguous, _temporary(folder, len(shards)), metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in shard.values())
            shards.append(list(shard))
        return _put_in_place(folder, shards, total)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights could not be written ({error}).") from error
    finally:
        for leftover in folder.glob(".writing-*"):
            leftover.unlink()


def _shards(tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _temporary(folder: Path, number: int) -> Path:
    return folder / f".writing-{os.getpid()}-{number}.safetensors"


def _put_in_place(folder: Path, shards: list[list[str]], total: int) -> list[Path]:
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [SINGLE_NAME]
    files = [folder / name for name in names]
    for number, file in enumerate(files):
        os.replace(_temporary(folder, number), file)
    if count > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        files.append(folder / INDEX_NAME)
    _remove_stale(folder, {file.name for file in files})
    return files


def _remove_stale(folder: Path, current: set[str]) -> None:
    """Weights of an earlier save under other names would be loaded instead of, or beside, the new."""
    for old in [*folder.glob("model*.safetensors"), folder / INDEX_NAME]:
        if old.name not in current:
            old.unlink(missing_ok=True)
