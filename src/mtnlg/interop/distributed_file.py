"""torch's distributed checkpoints (``.metadata`` and ``*.distcp``), tensors only, both ways.

``.metadata`` is a pickle of a table: which part of which tensor lies in which file, from where to where.
It is read with an unpickler that knows the classes of that table and nothing else. Each part is a file of
``torch.save`` inside the file, whose numbers are found by its directory, so they are read where they lie.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.serialization import _get_layout

from mtnlg.config import CheckpointError
from mtnlg.interop.lazy_tensor import FileBytes, Parts, lazy
from mtnlg.interop.torch_file import Record

if TYPE_CHECKING:
    from torch.distributed.checkpoint import metadata as tables
else:

    class _Tables:
        """That module, imported when it is used: it takes as long as half of torch, and few need it."""

        def __getattr__(self, name: str) -> Any:
            from torch.distributed.checkpoint import metadata

            return getattr(metadata, name)

    tables = _Tables()

METADATA = ".metadata"
_TABLES = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_KNOWN: dict[tuple[str, str], Any] = {
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("collections", "OrderedDict"): dict,
}
_RECORDS = ("torch.distributed.checkpoint.planner", "megatron.", "torch.distributed.checkpoint.api")


def _storage_info() -> Any:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo


class _TableReader(pickle.Unpickler):
    """Builds the table, inert records for the planner's notes in it, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == _TABLES and isinstance(getattr(tables, name, None), type):
            return getattr(tables, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == _STORAGE_INFO:
            return _storage_info()
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module.startswith(_RECORDS):
            return type(name, (Record,), {})
        raise CheckpointError(
            f"its pickle names {module}.{name}, which could run code, so it is not opened."
        )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, none of them read.

    Raises:
        CheckpointError: it is damaged, or its table names things that it has no business to name.
    """
    path = folder / METADATA
    try:
        table = _TableReader(io.BytesIO(path.read_bytes())).load()
        entries = table.state_dict_metadata
        places = {
            (index.fqn, tuple(index.offset or ())): info for index, info in table.storage_data.items()
        }
        found = {}
        for name, entry in entries.items():
            if isinstance(entry, tables.TensorStorageMetadata):
                found[name] = _tensor(folder, name, entry, places)
        return found
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename}: the file is missing.") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}).") from None
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{folder}: a file is damaged ({error}).") from None


def _tensor(folder: Path, name: str, entry: Any, places: dict[Any, Any]) -> Tensor:
    parts = []
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        info = places.get((name, offsets)) or places[name, ()]
        source = InnerFile(folder / info.relative_path, info.offset, info.length, len(chunk.sizes) == 0)
        parts.append((offsets, lazy(source, chunk.sizes, entry.properties.dtype)))
    if len(parts) == 1 and tuple(parts[0][1].shape) == tuple(entry.size):
        return parts[0][1]
    return lazy(Parts(tuple(entry.size), parts), entry.size, entry.properties.dtype)


@dataclass(frozen=True)
class InnerFile:
    """A tensor in a file of ``torch.save`` that lies inside another file.

    Args:
        path: the outer file.
        start: where the inner one begins, bytes.
        length: of it, bytes.
        is_scalar: the tensor has no axes.
    """

    path: Path
    start: int
    length: int
    is_scalar: bool = False

    def read(self, view: Tensor) -> Tensor:
        """See :class:`~mtnlg.interop.lazy_tensor.Source`."""
        with self.path.open("rb") as file:
            record = _data_record(_Window(file, self.start, self.length), str(self.path))
        return FileBytes(self.path, self.start + record).read(view)


def _data_record(window: _Window, where: str) -> int:
    """Where the numbers of the only tensor of a file begin in it."""
    with zipfile.ZipFile(window) as archive:
        records = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        if len(records) != 1 or records[0].compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{where}: a part of it is no single tensor.")
        window.seek(records[0].header_offset + 26)
        lengths = window.read(4)  # of the name and of the extra field in front of the numbers
    name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return records[0].header_offset + 30 + name + extra


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._place))
        self._file.seek(self._start + self._place)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


@dataclass
class DistributedWriter:
    """Writes a checkpoint of one process, one part of a tensor in memory at a time.

    Args:
        folder: exists already.
    """

    folder: Path
    _entries: dict[str, Any] = field(default_factory=dict)
    _places: dict[Any, Any] = field(default_factory=dict)
    _offset: int = 0
    _name: str = "__0_0.distcp"

    def add_part(self, name: str, part: Tensor, offsets: Iterable[int], shape: Iterable[int]) -> None:
        """Write what lies from ``offsets`` on in the tensor ``name`` of ``shape``."""
        part, begin = part.detach().cpu().contiguous(), torch.Size(offsets)
        if part.untyped_storage().nbytes() > part.nbytes:
            part = part.clone()  # else torch.save writes the whole storage
        properties = tables.TensorProperties(dtype=part.dtype)
        empty = tables.TensorStorageMetadata(properties, torch.Size(shape), [])
        entry = self._entries.setdefault(name, empty)
        entry.chunks.append(tables.ChunkStorageMetadata(begin, part.shape))
        index = tables.MetadataIndex(name, begin, len(entry.chunks) - 1)
        self._append(index, part)

    def add_object(self, name: str, value: Any) -> None:
        """Write something that is no tensor."""
        self._entries[name] = tables.BytesStorageMetadata()
        self._append(tables.MetadataIndex(name), value)

    def _append(self, index: tables.MetadataIndex, value: Any) -> None:
        packed = io.BytesIO()
        torch.save(value, packed)
        with (self.folder / self._name).open("ab") as file:
            file.write(packed.getbuffer())
        length = packed.getbuffer().nbytes
        self._places[index] = _storage_info()(self._name, self._offset, length)
        self._offset += length

    def finish(self) -> None:
        """Write the table: until then there is no checkpoint."""
        table = tables.Metadata(self._entries, None, self._places)
        with (self.folder / METADATA).open("wb") as file:
            pickle.dump(table, file)
