"""Named tensors in a folder of safetensors files: whole, sharded by name, or sharded by slice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mtnlg.config import CheckpointError
from mtnlg.interop.lazy_tensor import Cut, Parts, cut_and_read, lazy
from mtnlg.interop.safetensors_file import safetensors_in
from mtnlg.interop.torch_file import as_lazy, read_torch_file

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
MAX_SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SLICES_KEY = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint's note of where a slice belongs


@dataclass
class _Entry:
    """Where each part of a tensor begins, and the part."""

    parts: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        ends = ([o + s for o, s in zip(offsets, part.shape)] for offsets, part in self.parts)
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
        """``model.safetensors``, or the shards that its index names; else ``pytorch_model.bin``, likewise.

        The latter are pickles: read with torch's ``weights_only``, which runs nothing of them.
        """
        if (folder / SINGLE_NAME).is_file():
            return cls([folder / SINGLE_NAME])
        if (folder / INDEX_NAME).is_file():
            return cls(_shards_of(folder / INDEX_NAME))
        if (folder / f"{PICKLE_NAME}.index.json").is_file():
            return cls._of_pickles(_shards_of(folder / f"{PICKLE_NAME}.index.json"))
        if (folder / PICKLE_NAME).is_file() and not any(folder.glob("*.safetensors")):
            return cls._of_pickles([folder / PICKLE_NAME])
        return cls.of_folder(folder)

    @classmethod
    def _of_pickles(cls, files: Sequence[Path]) -> TensorFolder:
        found: dict[str, Tensor] = {}
        for file in files:
            held = read_torch_file(file)
            if not isinstance(held, Mapping) or not all(isinstance(one, Tensor) for one in held.values()):
                raise CheckpointError(f"{file}: it holds something else than named tensors.")
            found |= {name: as_lazy(tensor) for name, tensor in held.items()}
        return cls.of_tensors(found)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> TensorFolder:
        """Tensors that lie elsewhere, lazy or not."""
        made = cls([])
        for name, tensor in tensors.items():
            made._entries[name] = _Entry([((0,) * tensor.dim(), tensor)])
        return made

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

    def lazy(self, name: str) -> Tensor:
        """The whole tensor ``name``, of which nothing has been read."""
        entry = self._entries[name]
        offsets, first = entry.parts[0]
        if len(entry.parts) == 1 and not any(offsets):
            return first
        return lazy(Parts(entry.shape, entry.parts), entry.shape, first.dtype)

    def read(self, name: str, cut: Cut | None = None) -> Tensor:
        """The tensor ``name``, in memory of its own on the CPU.

        Args:
            name: which.
            cut: what of it is wanted; only that is read. ``None`` is all.

        Raises:
            CheckpointError: slices are missing, or a file is cut short.
        """
        try:
            return cut_and_read(name, self.lazy(name), cut)
        except CheckpointError as error:
            raise CheckpointError(f"tensor {name}: {error}") from None

    def _add(self, path: Path) -> None:
        tensors, metadata = safetensors_in(path)
        notes = json.loads(metadata.get(_SLICES_KEY, "{}"))
        for name, tensor in tensors.items():
            offsets = tuple(notes.get(name, {}).get("saved_offsets", [0] * tensor.dim()))
            self._entries.setdefault(name, _Entry()).parts.append((offsets, tensor))


def _shards_of(index: Path) -> list[Path]:
    """The files that an index names, all of its own folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights ({error}).") from None
    return [index.parent / Path(name).name for name in names]


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
