"""Arrays that are computed once and then memory mapped by every rank and every later start.

Each entry is some ``.npy`` files and a ``.json`` with their checksums, written last. All files appear by
renaming, so a reader sees whole files only; a file lock lets one of several ranks that start together
build while the others wait. Where locks do not work two ranks build the same bytes, which is harmless.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]
_log = logging.getLogger("mtnlg.tokens")


class IndexCache:
    """A folder of cached arrays.

    Args:
        folder: made when first written to; ``None`` keeps nothing and always builds.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def get(self, name: str, build: Callable[[], Arrays]) -> Arrays:
        """The arrays of entry ``name``: memory mapped if cached, else built and then cached.

        A damaged entry is built again. A folder that cannot be written to is a warning, not an error:
        the arrays are then built in memory.
        """
        if self.folder is None:
            return build()
        arrays = self.load(name)
        if arrays is not None:
            return arrays
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _lock(self.folder / f"{name}.lock"):
                arrays = self.load(name)  # another process may have built it while we waited
                if arrays is None:
                    arrays = build()
                    self._save(name, arrays)
        except OSError as error:
            self._warn_not_kept(error)
        return build() if arrays is None else arrays

    def replace(self, name: str, arrays: Arrays) -> None:
        """Write entry ``name`` anew; a folder that cannot be written to is a warning."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._save(name, arrays)
        except OSError as error:
            self._warn_not_kept(error)

    def load(self, name: str) -> Arrays | None:
        """The arrays of entry ``name``, read-only memory maps; ``None`` if missing or damaged."""
        if self.folder is None or not (self.folder / f"{name}.json").exists():
            return None
        try:
            checksums = json.loads((self.folder / f"{name}.json").read_text())
            arrays = {key: _map_file(self._path(name, key)) for key in checksums}
            damaged = [key for key, array in arrays.items() if _checksum(array) != checksums[key]]
        except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
            _log.warning("the index %s in %s is damaged (%s): building it again", name, self.folder, error)
            return None
        if damaged:
            _log.warning(
                "the index %s in %s is damaged (checksum of %s): building it again",
                name,
                self.folder,
                ", ".join(damaged),
            )
            return None
        return arrays

    def _save(self, name: str, arrays: Arrays) -> None:
        assert self.folder is not None
        for key, array in arrays.items():
            _write(self._path(name, key), lambda file, array=array: np.save(file, array))
        text = json.dumps({key: _checksum(array) for key, array in arrays.items()})
        _write(self.folder / f"{name}.json", lambda file: file.write(text.encode()))

    def _warn_not_kept(self, error: OSError) -> None:
        _log.warning(
            "the index in %s cannot be written (%s): it is kept in memory only; "
            "set data.cache_dir to a folder that can be written to",
            self.folder,
            error,
        )

    def _path(self, name: str, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}-{key}.npy"


def _map_file(path: Path) -> np.ndarray:
    # A plain view: indexing numpy's memmap class costs several times as much.
    return np.asarray(np.load(path, mmap_mode="r"))


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def _write(path: Path, write: Callable) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows: see the module's text, building twice is harmless
        yield
        return
    with open(path, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield  # closing the file releases the lock, as does the death of the process
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
