"""Ranks that note what they train on, and ranks that do it wrong on purpose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from tests.parallel import parity_worker
from tests.parallel.workers import mesh_of
from torch import Tensor, nn

from mtnlg.config import LayoutConfig, RunConfig
from mtnlg.parallel import Mesh, ParallelModel, build_mesh
from mtnlg.tokens.stream import BatchStream
from mtnlg.training.trainer import Trainer

Seen = Counter[tuple[int, int, int]]  # (step, position, token) → times embedded while training


def tokens_trained_on(config: RunConfig, repeats_first_share: bool = False) -> Seen:
    """Train; what this rank embedded, empty on ranks that share a share with another one.

    Args:
        config: of a run that may have a checkpoint to go on from.
        repeats_first_share: make a mistake: every replica reads the first one's samples.
    """
    layout = config.layout
    mesh = mesh_of(vars(layout)) if layout.num_ranks > 1 else build_mesh(LayoutConfig(data_parallel_size=1))
    seen: Seen = Counter()
    with _all_read_the_first_share() if repeats_first_share else mock.patch.dict({}):
        trainer = Trainer(
            config, replace(mesh, layout=replace(layout, data_parallel_size=mesh.num_replicas))
        )
        embedding = trainer.model.stages[0].decoder.embedding
        if embedding is not None and mesh.tensor_rank == 0:
            embedding.register_forward_pre_hook(_note_in(seen, lambda: trainer.position.step))
        trainer.run()
    return seen


def _note_in(seen: Seen, step: Callable[[], int]) -> Callable[[nn.Module, tuple[Tensor, Tensor]], None]:
    def note(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        if module.training:
            ids, positions = torch.broadcast_tensors(*inputs)
            pairs = zip(positions.flatten().tolist(), ids.flatten().tolist())
            seen.update((step(), position, token) for position, token in pairs)

    return note


@contextmanager
def _all_read_the_first_share() -> Iterator[None]:
    original = BatchStream.batch

    def batch(self: BatchStream, position: int, size: int, replica: int = 0, num_replicas: int = 1) -> Any:
        return original(self, position, size, 0, num_replicas)

    with mock.patch.object(BatchStream, "batch", batch):
        yield


def run_with_fault(fault: str, *case: Any) -> dict[str, Any]:
    """A case of the parity matrix, with a mistake of layouts made on purpose."""
    with FAULTS[fault]():
        return parity_worker.run_case(*case)


@contextmanager
def _gradients_are_averaged() -> Iterator[None]:
    """The replicas' mean instead of their sum: the loss stays right."""
    original = ParallelModel.forward_backward

    def forward_backward(self: ParallelModel, *args: Any, **options: Any) -> Tensor:
        loss = original(self, *args, **options)
        self.scale_gradients(1.0 / self.mesh.num_replicas)
        return loss

    with mock.patch.object(ParallelModel, "forward_backward", forward_backward):
        yield


@contextmanager
def _samples_are_doubled() -> Iterator[None]:
    """Every replica takes the first one's share."""
    original = parity_worker.share_of

    def share_of(batches: Any, mesh: Mesh) -> Any:
        count = len(batches) // mesh.num_replicas
        return original(batches[:count] * mesh.num_replicas, mesh)

    with mock.patch.object(parity_worker, "share_of", share_of):
        yield


@contextmanager
def _norm_counts_copies() -> Iterator[None]:
    """Each rank's squares are counted, held by another one or not."""
    with mock.patch("mtnlg.parallel.gradients._is_first_holder", lambda *_: True):
        yield


@contextmanager
def _a_rank_steps_apart() -> Iterator[None]:
    """A second rank's optimizer uses another rate: copies of a weight drift."""
    config = parity_worker.OPTIMIZER
    rank = torch.distributed.get_rank()
    with mock.patch.object(parity_worker, "OPTIMIZER", replace(config, learning_rate=0.1 + 0.001 * rank)):
        yield


FAULTS = {
    "gradients are averaged": _gradients_are_averaged,
    "samples are doubled": _samples_are_doubled,
    "norm counts copies": _norm_counts_copies,
    "a rank steps apart": _a_rank_steps_apart,
}
