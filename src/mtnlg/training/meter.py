"""Turns the outcomes of steps into metrics: means, rates, utilisation, time left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from mtnlg.config import RunConfig
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.routing import ExpertLoad, merge_loads
from mtnlg.training.events import ExpertMetrics, StepMetrics
from mtnlg.training.flops import hardware_flops_per_token, model_flops_per_token
from mtnlg.training.metrics import peak_memory_bytes
from mtnlg.training.peak import measure_peak, peak_flops
from mtnlg.training.precision import compute_dtype
from mtnlg.training.step import StepOutcome
from mtnlg.training.stopping import Position

RATE_STEPS = 20  # steps over which the live rate is averaged
PEAK_SECONDS = 30.0  # between two looks at what a CPU can do at best


def layout_peak_flops(mesh: Mesh, dtype: torch.dtype) -> float:
    """FLOP/s of all devices of the layout together; every rank calls this.

    The ranks of a CPU layout share one machine, so there the peak is the machine's: rank 0 measures
    with the threads of all ranks together while the others wait.
    """
    if mesh.device.type == "cuda":
        return mesh.num_ranks * peak_flops(mesh.device, dtype)
    measured = 0.0
    if mesh.is_main:
        threads = torch.get_num_threads()
        torch.set_num_threads(min(threads * mesh.num_ranks, available_cores()))
        measured = peak_flops(mesh.device, dtype)
        torch.set_num_threads(threads)
    shared = mesh.broadcast_object(measured)
    assert isinstance(shared, float)
    return shared


def available_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Meter:
    """Collects steps and hands out metrics of the last one or of all since the last log line.

    Args:
        config: of the run; decides the operations of a token.
        mesh: this rank's place.
    """

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        length = config.data.sequence_length
        self.peak = layout_peak_flops(mesh, compute_dtype(config.precision.dtype))
        target = config.data.target_length(config.model.has_encoder)
        self.model_flops = model_flops_per_token(config.model, length, target, config.adapter)
        self.hardware_flops = hardware_flops_per_token(
            config.model,
            length,
            config.training.activation_recomputation,
            config.training.recomputed_operators,
            target,
            config.adapter,
        )
        self.learning_rate = config.optimizer.learning_rate
        self.sequence_length = length
        self._device = mesh.device
        self._dtype = compute_dtype(config.precision.dtype)
        self._may_measure = mesh.device.type == "cpu" and mesh.num_ranks == 1
        self._measured = time.monotonic()
        self._recent: list[tuple[int, float]] = []
        self._since_log: list[tuple[int, float, StepOutcome]] = []
        self._begin: tuple[float, float] | None = None  # wall time and progress at the first step

    def begin_step(self) -> None:
        """Start the step's stopwatch."""
        self._started = time.perf_counter()

    def end_step(
        self,
        outcome: StepOutcome,
        batch_size: int,
        position: Position,
        progress: float,
        factor: float,
        loss_scale: float,
        skipped_steps: int,
    ) -> StepMetrics:
        """Metrics of the step that just ended."""
        seconds = time.perf_counter() - self._started
        tokens = batch_size * self.sequence_length
        self._recent = [*self._recent[1 - RATE_STEPS :], (tokens, seconds)]
        self._since_log.append((tokens, seconds, outcome))
        rate = sum(item[0] for item in self._recent) / sum(item[1] for item in self._recent)
        return StepMetrics(
            step=position.step,
            tokens=position.tokens,
            loss=outcome.loss,
            learning_rate=self.learning_rate * factor,
            gradient_norm=outcome.gradient_norm,
            batch_size=batch_size,
            tokens_per_second=rate,
            mfu=rate * self.model_flops / self.peak,
            hfu=rate * self.hardware_flops / self.peak,
            memory_bytes=peak_memory_bytes(self._device),
            loss_scale=loss_scale,
            skipped=not outcome.applied,
            skipped_steps=skipped_steps,
            seconds=position.seconds,
            progress=progress,
            eta_seconds=self._eta(progress),
            experts=_expert_metrics([outcome.expert_load]),
        )

    def log_line(self, last: StepMetrics) -> StepMetrics:
        """``last`` with loss, norm and rates as means over the steps since the last log line."""
        self._look_for_a_higher_peak()
        lines, self._since_log = self._since_log, []
        applied = [(tokens, outcome) for tokens, _, outcome in lines if outcome.applied]
        weight = sum(tokens for tokens, _ in applied)
        rate = sum(tokens for tokens, _, _ in lines) / sum(seconds for _, seconds, _ in lines)
        mean = replace(
            last,
            tokens_per_second=rate,
            mfu=rate * self.model_flops / self.peak,
            hfu=rate * self.hardware_flops / self.peak,
        )
        if not weight:
            return mean
        return replace(
            mean,
            loss=sum(tokens * outcome.loss for tokens, outcome in applied) / weight,
            gradient_norm=sum(outcome.gradient_norm for _, outcome in applied) / len(applied),
            experts=_expert_metrics([outcome.expert_load for _, outcome in applied]),
        )

    def _look_for_a_higher_peak(self) -> None:
        """Measure a CPU's peak again: something else may have kept it busy the first time."""
        if self._may_measure and time.monotonic() - self._measured > PEAK_SECONDS:
            self.peak = max(self.peak, measure_peak(self._device.type, self._dtype, seconds=0.1))
            self._measured = time.monotonic()

    @property
    def has_unlogged(self) -> bool:
        """Whether steps were made since the last log line."""
        return bool(self._since_log)

    def _eta(self, progress: float) -> float | None:
        now = time.monotonic()
        if self._begin is None:
            self._begin = (now, progress)
            return None
        began, at = self._begin
        return (now - began) / (progress - at) * (1.0 - progress) if progress > at else None


def _expert_metrics(loads: Sequence[ExpertLoad | None]) -> ExpertMetrics | None:
    """The metrics of some steps together; ``None`` in a dense model."""
    given = [load for load in loads if load is not None]
    if not given:
        return None
    load = merge_loads(given)
    shares = [[round(share, 4) for share in layer] for layer in load.shares]
    return ExpertMetrics(load.balance_loss, load.z_loss, max(map(max, shares)), shares)
