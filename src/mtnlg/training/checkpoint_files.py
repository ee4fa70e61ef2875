"""The files of checkpoints: manifest with checksums, the ``latest`` pointer, pruning.

```
checkpoints/
  latest                     name of the newest complete checkpoint
  step-00001000/
    weights/*.safetensors    parameters by canonical name
    optimizer/*.safetensors  optimizer state by NAME.KIND
    state.json               step, tokens, position in the data, loss scale, ... and the config
    manifest.json            size and SHA-256 of every file above
```

A checkpoint is written into a hidden folder and renamed when its manifest is on the disk: a folder
``step-*`` without a valid manifest is not a checkpoint. Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtnlg.config import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
PREFIX = "step-"
TEMPORARY_PREFIX = ".writing-"


def checkpoints_dir(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoint_name(step: int) -> str:
    """``step-00001000`` for 1000."""
    return f"{PREFIX}{step:08d}"


def step_of(path: Path) -> int | None:
    """The step of a checkpoint's folder; ``None`` if it is not one by its name."""
    digits = path.name.removeprefix(PREFIX)
    return int(digits) if path.name.startswith(PREFIX) and digits.isdigit() else None


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """All checkpoint folders of a run, newest first, complete or not."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """What ``latest`` points to, or the newest folder where the pointer is missing or wrong."""
    folder = checkpoints_dir(run_dir)
    try:
        pointed = folder / (folder / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        pointed = None
    if pointed is not None and step_of(pointed) is not None and pointed.is_dir():
        return pointed
    return next(iter(list_checkpoints(run_dir)), None)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` so that a reader, or a crash, sees the old text or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def data_files(folder: Path) -> list[str]:
    """Names, relative to ``folder``, of all files that its manifest covers."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found if path.name != MANIFEST)


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write ``manifest.json``: the last file of a checkpoint."""
    write_atomically(folder / MANIFEST, json.dumps({"format": 1, "files": entries}, indent=1))


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's entries by file name.

    Raises:
        CheckpointError: it is missing or not readable.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): dict(entry) for name, entry in entries.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is incomplete: it has no {MANIFEST}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}.") from None


def verify_files(folder: Path, share: int = 0, num_shares: int = 1, only: tuple[str, ...] = ("",)) -> None:
    """Compare files with the manifest.

    Args:
        folder: the checkpoint.
        share: which of ``num_shares`` equal parts of the files to read, so that ranks share the work.
        num_shares: see ``share``.
        only: beginnings of the names to read; all by default.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or changed.
    """
    entries = read_manifest(folder)
    if STATE not in entries:
        raise CheckpointError(f"{folder} is incomplete: its manifest does not name {STATE}.")
    chosen = sorted(name for name in entries if name.startswith(only))
    for name in chosen[share::num_shares]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != entries[name].get("size"):
                raise CheckpointError(
                    f"{path} is damaged: {size} bytes, the manifest says {entries[name].get('size')}."
                )
            if file_entry(path)["sha256"] != entries[name].get("sha256"):
                raise CheckpointError(f"{path} is damaged: its checksum differs from the manifest's.")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def read_state(folder: Path) -> dict[str, Any]:
    """The checkpoint's ``state.json``.

    Raises:
        CheckpointError: it is missing or not readable.
    """
    try:
        return dict(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} cannot be read: {error}.") from None


def prune(run_dir: str | Path, keep_last: int, keep_every: int, keep: Sequence[Path] = ()) -> None:
    """Delete what need not be kept: all but the newest and every ``keep_every`` steps.

    Folders that were left half written by a crash go too.

    Args:
        run_dir: the run's folder.
        keep_last: newest checkpoints to keep.
        keep_every: multiples of this many steps stay; 0 keeps none for that.
        keep: further folders that stay.
    """
    found = list_checkpoints(run_dir)
    for path in found[keep_last:]:
        step = step_of(path) or 0
        if path not in keep and not (keep_every and step % keep_every == 0):
            shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(run_dir)


def remove_leftovers(run_dir: str | Path) -> None:
    """Delete folders that were left half written by a crash."""
    for leftover in checkpoints_dir(run_dir).glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
