"""Where compiled libraries are kept, and for how long."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from functools import cache
from pathlib import Path

UNUSED_SECONDS = 30 * 86400.0  # after these a library that nobody loaded goes
UNFINISHED_SECONDS = 86400.0  # what a compiler left behind that was killed
NOTED_SECONDS = 86400.0  # a use is noted down once in these
PART = ".part-"  # in the name of what is not finished
logger = logging.getLogger(__name__)


class NoFolderError(OSError):
    """Libraries can be kept nowhere."""


def cache_folder() -> Path | None:
    """``mtnlg`` in the user's cache (``XDG_CACHE_HOME``, else ``~/.cache``); ``None`` without a home."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "mtnlg"
    try:
        return Path.home() / ".cache" / "mtnlg"
    except RuntimeError:  # a container's user whom no file names
        return None


def kept(name: str) -> Path | None:
    """A library that is here already; that it is used is noted down."""
    folders = [cache_folder()] + ([_own_folder()] if _own_folder.cache_info().currsize else [])
    for folder in folders:
        if folder is None or not (folder / name).is_file() or _forbids_programs(folder):
            continue
        with contextlib.suppress(OSError):  # a folder that one may only read
            if time.time() - (folder / name).stat().st_mtime > NOTED_SECONDS:
                os.utime(folder / name)
        return folder / name
    return None


def folder_to_write() -> Path:
    """The cache, or where it cannot be used a folder of this process, which goes with it.

    Raises:
        NoFolderError: no temporary folder can hold them either.
    """
    folder = cache_folder()
    obstacle = "there is no home and no XDG_CACHE_HOME" if folder is None else _obstacle(folder)
    if folder is not None and obstacle is None:
        return folder
    if not _own_folder.cache_info().currsize:
        if _forbids_programs(Path(tempfile.gettempdir())):
            raise NoFolderError(f"{obstacle}, and {tempfile.gettempdir()} allows no programs (noexec)")
        logger.warning(
            "compiled kernels cannot be kept (%s): every start compiles them anew, which takes seconds. "
            "Set XDG_CACHE_HOME to a folder that can be written.",
            obstacle,
        )
    return _own_folder()


@cache
def _own_folder() -> Path:
    _HELD.append(tempfile.TemporaryDirectory(prefix="mtnlg-kernels-"))  # for this user only
    return Path(_HELD[-1].name)


_HELD: list[tempfile.TemporaryDirectory[str]] = []


def _obstacle(folder: Path) -> str | None:
    """Why libraries cannot be kept there; ``None`` if they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=PART):
            return f"{folder} allows no programs (noexec)" if _forbids_programs(folder) else None
    except OSError as error:
        return f"{folder}: {error.strerror}"


def _forbids_programs(folder: Path) -> bool:
    if not hasattr(os, "ST_NOEXEC"):
        return False
    return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)


def remove_old(folder: Path, keep: Path) -> None:
    """Remove libraries that nobody has loaded for a month, and what compilers left unfinished.

    A process that has one loaded keeps it: the system frees the file with its last user.

    Args:
        folder: of libraries.
        keep: the one that is new.
    """
    now = time.time()
    for path in folder.glob("*.so"):
        is_unfinished = PART in path.name or path.name.startswith("tmp")
        with contextlib.suppress(OSError):  # another process was first, or it is not ours
            old = UNFINISHED_SECONDS if is_unfinished else UNUSED_SECONDS
            if path != keep and now - path.stat().st_mtime > old:
                path.unlink()
