"""Saving and loading checkpoints that any layout can continue.

Tensors go through ``torch.distributed.checkpoint`` into safetensors files: every rank writes the parts
it holds, and a rank of any other layout reads the parts it needs.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from mtnlg.config import CheckpointError, TrainingError
from mtnlg.parallel.mesh import Mesh
from mtnlg.training import checkpoint_files as files
from mtnlg.training.tensor_files import TensorWriter

TensorsByName = dict[str, Tensor]


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    parts: dict[str, TensorsByName],
    state: dict[str, Any],
    mesh: Mesh,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write one checkpoint and point ``latest`` to it; every rank calls this.

    Args:
        run_dir: the run's folder.
        step: steps done.
        parts: ``weights`` and ``optimizer``: this rank's tensors (DTensors where divided) by name.
        state: what goes into ``state.json``.
        mesh: this rank's place.
        group: for messages between ranks; ``None`` is the group of all training messages, which no
            other thread may be using.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: it could not be written (full disk, no permission). What was written of it is
            removed and the last good checkpoint stays.
    """
    folder = files.checkpoints_dir(run_dir)
    temporary = folder / f"{files.TEMPORARY_PREFIX}{files.checkpoint_name(step)}"
    final = folder / files.checkpoint_name(step)
    entries: dict[str, dict[str, Any]] = {}
    try:
        _together(mesh, group, lambda: _begin(temporary), main_only=True)
        for part, tensors in parts.items():
            write = partial(_write, temporary, part, tensors, mesh, group)
            for written in _together(mesh, group, write):
                entries.update(written or {})
        _together(mesh, group, lambda: _finish(temporary, final, state, entries), main_only=True)
    except OSError as error:
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise TrainingError(_save_failed(final, error, run_dir)) from error
    return final


def load_tensors(folder: Path, part: str, tensors: TensorsByName, mesh: Mesh) -> None:
    """Fill ``tensors`` in place from one part of a checkpoint; every rank calls this.

    Raises:
        CheckpointError: the checkpoint does not hold what is asked for.
    """
    try:
        _check_shapes(folder / part, tensors)
        reader = HuggingFaceStorageReader(str(folder / part))
        with _quietly():
            dcp.load(tensors, storage_reader=reader, no_dist=mesh.device_mesh is None)
    except CheckpointError:
        raise
    except (CheckpointException, SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"{folder / part} cannot be loaded: {error}") from error


def newest_good_checkpoint(run_dir: str | Path, mesh: Mesh, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are whole; every rank calls this and gets the same answer.

    Args:
        run_dir: the run's folder.
        mesh: this rank's place.
        warn: told of each checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints and none is whole.
    """
    latest, found = files.latest_checkpoint(run_dir), files.list_checkpoints(run_dir)
    candidates = [str(path) for path in ([latest] if latest else []) + found if path is not None]
    ordered = [Path(path) for path in dict.fromkeys(_agreed(mesh, candidates))]
    problems: list[str] = []
    for path in ordered:
        problem = _first_problem(mesh, path)
        if problem is None:
            if problems:
                warn(f"going on from {path.name}, the newest checkpoint that is whole.")
            return path
        problems.append(problem)
        warn(f"checkpoint refused: {problem}")
    if problems:
        raise CheckpointError(
            f"none of the checkpoints in {files.checkpoints_dir(run_dir)} is whole: {problems[0]} "
            "Restore one, or move the folder away to train from the beginning."
        )
    return None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that one process saves as one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write(
    temporary: Path, part: str, tensors: TensorsByName, mesh: Mesh, group: dist.ProcessGroup | None
) -> dict[str, dict[str, Any]]:
    """Write what this rank holds; return the manifest's entries of its files."""
    writer = TensorWriter(temporary / part)
    try:
        with _quietly():
            no_dist = mesh.device_mesh is None
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=no_dist)
    except CheckpointException as error:
        causes = [cause for cause, _trace in error.failures.values()]
        cause = next((cause for cause in causes if isinstance(cause, OSError)), None)
        raise cause or RuntimeError(f"saving failed: {causes}") from error
    return {f"{part}/{name}": entry for name, entry in writer.entries.items()}


def _finish(
    temporary: Path, final: Path, state: dict[str, Any], entries: dict[str, dict[str, Any]]
) -> None:
    files.write_atomically(temporary / files.STATE, json.dumps(state, indent=1, ensure_ascii=False))
    files.write_manifest(temporary, {**entries, files.STATE: files.file_entry(temporary / files.STATE)})
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    files.write_atomically(final.parent / files.LATEST, final.name + "\n")


def _save_failed(final: Path, error: OSError, run_dir: str | Path) -> str:
    what = f"the checkpoint {final} could not be saved: {error.strerror or error}."
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(run_dir).free
        what = f"the disk is full ({free / 1e6:.0f} MB free): {what}"
    good = files.latest_checkpoint(run_dir)
    kept = f" The last good one, {good}, stays:" if good else ""
    return f"{what}{kept} make room and run the same command to go on."


def _check_shapes(folder: Path, tensors: TensorsByName) -> None:
    """Say in plain words what does not fit, before torch's loader says it in its own."""
    stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in stored:
            raise CheckpointError(f"{folder} does not hold {name}: it belongs to another model.")
        shape = tuple(getattr(stored[name], "size", ()))
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{folder}: {name} has the shape {list(shape)} and the model's is "
                f"{list(tensor.shape)}: it belongs to another model."
            )


def _together(
    mesh: Mesh, group: dist.ProcessGroup | None, work: Callable[[], Any], main_only: bool = False
) -> list[Any]:
    """Run ``work`` on all ranks (or rank 0) and raise on all ranks what any of them raised.

    Returns:
        What each rank's ``work`` returned, by rank.
    """
    result: Any = None
    failure: Exception | None = None
    if mesh.is_main or not main_only:
        try:
            result = work()
        except Exception as error:  # whatever it is: the other ranks wait for an answer
            failure = error
    if mesh.device_mesh is None:
        if failure is not None:
            raise failure
        return [result]
    answers: list[Any] = [None] * mesh.num_ranks
    told = failure if failure is None or isinstance(failure, OSError) else RuntimeError(repr(failure))
    dist.all_gather_object(answers, (result, told), group=group)
    first = next((error for _, error in answers if error is not None), None)
    if first is not None:
        raise failure or first
    return [answer for answer, _ in answers]


def _agreed(mesh: Mesh, names: list[str]) -> list[str]:
    """Rank 0's list: file systems may show different ranks different things."""
    shared = mesh.broadcast_object(names)
    assert isinstance(shared, list)
    return shared


def _first_problem(mesh: Mesh, folder: Path) -> str | None:
    """What is wrong with a checkpoint, each rank reading its share of the files."""
    problem: str | None = None
    try:
        files.verify_files(folder, mesh.rank, mesh.num_ranks)
    except CheckpointError as error:
        problem = str(error)
    if mesh.device_mesh is None:
        return problem
    problems: list[str | None] = [None] * mesh.num_ranks
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)
