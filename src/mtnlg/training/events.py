"""What a run tells while it goes on: plain values, handed to callbacks on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunStart:
    """The run begins, or goes on.

    Args:
        run_dir: the run's folder.
        num_parameters: of the whole model.
        step: steps already done (0 for a new run).
        total_tokens: tokens at which the run ends; ``None`` where time ends it.
        device: ``cpu`` or the GPU's name.
        num_ranks: processes taking part.
        peak_flops: FLOP/s of all devices together, MFU's denominator.
    """

    run_dir: str
    num_parameters: int
    step: int
    total_tokens: int | None
    device: str
    num_ranks: int
    peak_flops: float


@dataclass(frozen=True)
class ExpertMetrics:
    """How the experts were used, over all ranks.

    Args:
        balance_loss: mean over tokens and layers, without its coefficient; 1 is an equal load.
        z_loss: mean squared log-sum-exp of the routers' logits, without its coefficient.
        largest_load: of the busiest expert of any layer, relative to the mean load of its layer.
        loads: of each expert of each layer that has experts, likewise.
    """

    balance_loss: float
    z_loss: float
    largest_load: float
    loads: list[list[float]]


@dataclass(frozen=True)
class StepMetrics:
    """One training step, or the mean over the steps since the last line of ``metrics.jsonl``.

    Args:
        step: steps done.
        tokens: tokens trained on so far.
        loss: mean cross entropy, nats a token.
        learning_rate: AdamW's.
        gradient_norm: global norm before clipping.
        batch_size: sequences of the step.
        tokens_per_second: over all ranks.
        mfu: share of the peak that the model's operations make up.
        hfu: the same with recomputed operations counted.
        memory_bytes: peak of the process (CPU) or of the device (GPU) so far.
        loss_scale: 1 unless fp16.
        skipped: the step was not applied, its gradients were not finite.
        skipped_steps: steps skipped so far.
        seconds: training time so far.
        progress: share of the run that is over.
        eta_seconds: expected time to the end; ``None`` at the very beginning.
        experts: how they were used; ``None`` in a dense model.
    """

    step: int
    tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    batch_size: int
    tokens_per_second: float
    mfu: float
    hfu: float
    memory_bytes: int
    loss_scale: float
    skipped: bool
    skipped_steps: int
    seconds: float
    progress: float
    eta_seconds: float | None
    experts: ExpertMetrics | None = None


@dataclass(frozen=True)
class ValidationMetrics:
    """One evaluation on the validation split.

    Args:
        step: steps done.
        tokens: tokens trained on so far.
        loss: mean cross entropy, nats a token.
        perplexity: its exponential.
        num_tokens: tokens it was measured on.
        improved: whether it beat the best one by the margin.
        seconds: training time so far.
        extra: what the ``evaluate`` callback returned.
    """

    step: int
    tokens: int
    loss: float
    perplexity: float
    num_tokens: int
    improved: bool
    seconds: float
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One continuation written during training."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Args:
        run_dir: the run's folder.
        step: steps done.
        tokens: tokens trained on.
        seconds: training time, all parts together.
        loss: mean training loss over the last line of metrics; ``None`` if no step was made.
        validation_loss: of the last evaluation, nats a token; ``None`` without one.
        best_validation_loss: lowest of all evaluations.
        stop_reason: ``tokens``, ``steps``, ``minutes``, ``convergence`` or ``signal``.
        exit_code: 0, or 130 (Ctrl-C) or 143 (SIGTERM).
        checkpoint: the last checkpoint's folder.
        first_validation_loss: of a tuning run before its first step; ``None`` elsewhere.
    """

    run_dir: str
    step: int
    tokens: int
    seconds: float
    loss: float | None
    validation_loss: float | None
    best_validation_loss: float | None
    stop_reason: str
    exit_code: int
    checkpoint: str | None
    first_validation_loss: float | None = None


class TrainingCallback:
    """Base of callbacks: override what you want to hear of. Called on rank 0 only."""

    def on_start(self, start: RunStart) -> None:
        """Training begins or goes on."""

    def on_step(self, metrics: StepMetrics) -> None:
        """A step is done."""

    def on_log(self, metrics: StepMetrics) -> None:
        """A line goes into ``metrics.jsonl``: means since the last one."""

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """An evaluation is done."""

    def on_sample(self, sample: Sample) -> None:
        """A sample was written."""

    def on_checkpoint(self, path: str, step: int) -> None:
        """A checkpoint is complete."""

    def on_message(self, message: str) -> None:
        """Something the user should know (a fallback, a skipped step, a signal)."""

    def on_end(self, result: TrainResult) -> None:
        """The run ended and its last checkpoint is written."""


CallbackSource = TrainingCallback | Callable[[], TrainingCallback]


class Callbacks(TrainingCallback):
    """Several callbacks as one.

    Args:
        sources: callbacks, or functions that make one. When ``train`` starts ranks of its own they
            must be picklable, and a function runs in rank 0's process.
    """

    def __init__(self, sources: Sequence[CallbackSource] = ()) -> None:
        self._parts = [s if isinstance(s, TrainingCallback) else s() for s in sources]

    def add(self, part: TrainingCallback) -> None:
        """Tell ``part`` too from now on."""
        self._parts.append(part)

    def on_start(self, start: RunStart) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_start(start)

    def on_step(self, metrics: StepMetrics) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_step(metrics)

    def on_log(self, metrics: StepMetrics) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_log(metrics)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_validation(metrics)

    def on_sample(self, sample: Sample) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_sample(sample)

    def on_checkpoint(self, path: str, step: int) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_checkpoint(path, step)

    def on_message(self, message: str) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_message(message)

    def on_end(self, result: TrainResult) -> None:
        """See ``TrainingCallback``."""
        for part in self._parts:
            part.on_end(result)
