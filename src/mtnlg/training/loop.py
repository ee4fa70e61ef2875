"""``train``: from a config to a trained run, in this process or on ranks that it starts or joins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mtnlg.config import RunConfig
from mtnlg.config.progress import Progress, no_progress
from mtnlg.parallel.float8 import check_float8
from mtnlg.parallel.launch import join_slurm, launch
from mtnlg.parallel.mesh import Mesh, build_mesh, ranks_present, resolve_layout
from mtnlg.training.checkpoint_files import checkpoints_dir
from mtnlg.training.device import choose_device
from mtnlg.training.events import Callbacks, CallbackSource, TrainResult
from mtnlg.training.meter import available_cores
from mtnlg.training.trainer import EvaluationHook, Trainer
from mtnlg.training.work import Work


def train(
    config: RunConfig,
    callbacks: Sequence[CallbackSource] = (),
    progress: Progress = no_progress,
    evaluate: EvaluationHook | None = None,
    fresh: bool = False,
    work: Work | None = None,
) -> TrainResult:
    """Prepare the run's folder, train, and leave a checkpoint.

    A folder that holds checkpoints goes on from the newest whole one. Under ``torchrun`` (or anything
    that sets ``RANK`` and ``WORLD_SIZE``) this process is one rank; otherwise a layout of several ranks
    starts them on this machine.

    Args:
        config: the run.
        callbacks: told what happens, on rank 0; see ``CallbackSource``.
        progress: told of the preparation.
        evaluate: adds metrics to each evaluation; see ``Trainer``.
        fresh: drop the folder's checkpoints and metrics and begin anew.
        work: what is trained on and begun from; ``None`` is training from the beginning.

    Raises:
        ConfigError: the config does not fit the machine, the model or the data.
        DataError: something to read is missing, damaged or has changed.
        CheckpointError: the folder's checkpoints belong to another run or are all damaged.
        TrainingError: training could not go on.
    """
    join_slurm()
    work = work or Work()
    device_type = choose_device(config.training.device)
    config.training.check_device(device_type)
    check_float8(config.precision, device_type)
    layout = resolve_layout(config.layout, device_type)
    replace(config, layout=layout)  # validates batch sizes against the real replicas
    if ranks_present() is not None and layout.num_ranks > 1:
        mesh = build_mesh(layout, device_type)
        config = _prepare_on_main(config, mesh, progress, fresh, work)
        return train_on_rank(replace(config, layout=layout), mesh, callbacks, evaluate, work)
    if fresh:
        forget(config.run_dir)
    # What is saved leaves open what was left open: the same run may go on with more ranks.
    config = replace(work.prepare(config, progress), layout=layout)
    if layout.num_ranks == 1:
        return train_on_rank(config, build_mesh(layout, device_type), callbacks, evaluate, work)
    args = (config, device_type, list(callbacks), evaluate, work)
    result = launch(_rank, layout, args, device_type, config.training.num_threads)
    assert isinstance(result, TrainResult)
    return result


def train_on_rank(
    config: RunConfig,
    mesh: Mesh,
    callbacks: Sequence[CallbackSource] = (),
    evaluate: EvaluationHook | None = None,
    work: Work | None = None,
) -> TrainResult:
    """Train on ranks that are already there; every rank calls this.

    Args:
        config: prepared; see ``prepare``.
        mesh: this rank's place.
        callbacks: as for ``train``.
        evaluate: as for ``train``.
        work: as for ``train``.
    """
    set_threads(config.training.num_threads, mesh)
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)
    listeners = Callbacks(callbacks if mesh.is_main else ())
    return Trainer(config, mesh, listeners, evaluate, work).run()


def set_threads(wanted: int | None, mesh: Mesh) -> None:
    """Give this rank its share of the machine's cores; alone it keeps torch's own choice."""
    if wanted is None and mesh.num_ranks > 1:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.num_ranks))
        wanted = max(1, available_cores() // neighbours)
    if wanted is not None:
        torch.set_num_threads(wanted)


def forget(run_dir: str) -> None:
    """Delete a run's checkpoints, metrics and samples; tokenizer and token files stay."""
    shutil.rmtree(checkpoints_dir(run_dir), ignore_errors=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (Path(run_dir) / name).unlink(missing_ok=True)
    shutil.rmtree(Path(run_dir) / "tensorboard", ignore_errors=True)


def _prepare_on_main(
    config: RunConfig, mesh: Mesh, progress: Progress, fresh: bool, work: Work
) -> RunConfig:
    """Prepare on rank 0 for all ranks that a launcher started."""
    outcome: RunConfig | Exception | None = None
    if mesh.is_main:
        try:
            if fresh:
                forget(config.run_dir)
            outcome = work.prepare(config, progress)
        except Exception as error:  # all ranks must hear of it, or they wait for ever
            outcome = error
    shared = mesh.broadcast_object(outcome)
    if isinstance(shared, Exception):
        raise shared
    assert isinstance(shared, RunConfig)
    return shared


def _rank(
    config: RunConfig,
    device_type: str,
    callbacks: Sequence[CallbackSource],
    evaluate: EvaluationHook | None,
    work: Work,
) -> TrainResult:
    """What each rank started by ``train`` runs."""
    return train_on_rank(config, build_mesh(config.layout, device_type), callbacks, evaluate, work)
