"""Saving and loading checkpoints that any layout can continue.

Tensors go through ``torch.distributed.checkpoint`` into safetensors files: every rank writes the parts
it holds, and a rank of any other layout reads the parts it needs.
"""

from __future__ import annotations

import dataclasses
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
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan

from mtnlg.config import CheckpointError, TrainingError
from mtnlg.parallel.mesh import Mesh
from mtnlg.training import checkpoint_files as files

FILE_BYTES = 2**30  # tensors of one file: what is held twice in memory while it is written

TensorsByName = dict[str, Tensor]


def save_checkpoint(
    run_dir: str | Path, step: int, parts: dict[str, TensorsByName], state: dict[str, Any], mesh: Mesh
) -> Path:
    """Write one checkpoint and point ``latest`` to it; every rank calls this.

    Args:
        run_dir: the run's folder.
        step: steps done.
        parts: ``weights`` and ``optimizer``: this rank's tensors (DTensors where divided) by name.
        state: what goes into ``state.json``.
        mesh: this rank's place.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: it could not be written (full disk, no permission). What was written of it is
            removed and the last good checkpoint stays.
    """
    folder = files.checkpoints_dir(run_dir)
    temporary = folder / f"{files.TEMPORARY_PREFIX}{files.checkpoint_name(step)}"
    final = folder / files.checkpoint_name(step)
    try:
        _together(mesh, lambda: _begin(temporary), main_only=True)
        for part, tensors in parts.items():
            _together(mesh, partial(_write, temporary / part, tensors, mesh))
        _together(mesh, lambda: _finish(temporary, final, state), main_only=True)
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


class _Writer(HuggingFaceStorageWriter):
    """torch's writer, splitting each rank's tensors into files of ``FILE_BYTES``.

    The split is by the plan of each rank: torch's own option is one mapping for all ranks, whose
    pipeline stages hold different tensors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        prepared = []
        for shard_index, plan in enumerate(plans, start=1):
            mapping: dict[str, int] = {}
            filled = 0
            for item in plan.items:
                mapping[item.index.fqn] = 1 + filled // FILE_BYTES
                filled += item.tensor_storage_size() or 0
            storage = {"shard_index": shard_index, "fqn_to_index_mapping": mapping}
            prepared.append(dataclasses.replace(plan, storage_data=storage))
        return prepared


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that one process saves as one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write(folder: Path, tensors: TensorsByName, mesh: Mesh) -> None:
    try:
        with _quietly():
            dcp.save(tensors, storage_writer=_Writer(folder), no_dist=mesh.device_mesh is None)
    except CheckpointException as error:
        causes = [cause for cause, _trace in error.failures.values()]
        cause = next((cause for cause in causes if isinstance(cause, OSError)), None)
        raise cause or RuntimeError(f"saving failed: {causes}") from error


def _finish(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    files.write_atomically(temporary / files.STATE, json.dumps(state, indent=1, ensure_ascii=False))
    entries = {name: files.file_entry(temporary / name) for name in files.data_files(temporary)}
    files.write_manifest(temporary, entries)
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


def _together(mesh: Mesh, work: Callable[[], None], main_only: bool = False) -> None:
    """Run ``work`` on all ranks (or rank 0) and raise on all ranks what any of them raised."""
    failure: OSError | None = None
    if mesh.is_main or not main_only:
        try:
            work()
        except OSError as error:
            failure = error
    if mesh.device_mesh is not None:
        failures: list[OSError | None] = [None] * mesh.num_ranks
        dist.all_gather_object(failures, failure)
        failure = next((error for error in failures if error is not None), None)
    if failure is not None:
        raise failure


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
