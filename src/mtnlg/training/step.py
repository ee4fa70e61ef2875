"""One optimizer step: micro-batches, the one loss rule, clipping, and what happens to a bad step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mtnlg.config import OptimizerConfig, TrainingError
from mtnlg.parallel.model import ParallelModel
from mtnlg.parallel.routing import ExpertLoad
from mtnlg.tokens.batch import Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer


@dataclass(frozen=True)
class StepOutcome:
    """What one step did.

    Args:
        loss: mean cross entropy over all valid tokens of the step, nats.
        gradient_norm: global norm before clipping, without the loss scale.
        applied: false where a loss or gradient was not finite, and the step changed nothing.
        expert_load: how the step used the experts; ``None`` in a dense model.
    """

    loss: float
    gradient_norm: float
    applied: bool
    expert_load: ExpertLoad | None = None


class TrainingStep:
    """Runs steps and keeps count of those that had to be skipped.

    Args:
        model: the laid-out model.
        optimizer: over its parameters.
        config: for the clipping norm.
        loss_scale: 1 unless fp16 trains.
        max_skipped: consecutive skipped steps after which training gives up. fp16's overflows do not
            count: its own limit is the smallest loss scale.
        before_update: called before weights and optimizer state change.
    """

    def __init__(
        self,
        model: ParallelModel,
        optimizer: Optimizer,
        config: OptimizerConfig,
        loss_scale: LossScale,
        max_skipped: int,
        before_update: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.clip_norm = config.clip_grad_norm
        self.max_skipped = max_skipped
        self.before_update = before_update
        self.skipped = 0
        self.skipped_in_a_row = 0

    def run(self, batches: Sequence[Batch], num_valid_tokens: int, factor: float) -> StepOutcome:
        """One step over ``batches``.

        The gradient is that of the summed cross entropy divided by the valid tokens of the whole
        step, over all micro-batches and ranks, so that every token weighs the same.

        Args:
            batches: this replica's micro-batches.
            num_valid_tokens: labels that are not ignored, over all micro-batches and replicas.
            factor: the schedule's factor of the peak learning rate.

        Raises:
            TrainingError: too many steps in a row were not finite.
        """
        scale = self.loss_scale.value
        total = self.model.forward_backward(batches, max(1, num_valid_tokens), scale)
        summed = self.model.mesh.sum_of_loss(total.detach().clone())
        norm = float(self.model.gradient_norm()) / scale
        expert_load = self.model.expert_load()
        loss = float(summed) / max(1, num_valid_tokens)
        applied = math.isfinite(norm) and math.isfinite(loss)
        if applied:
            if self.before_update is not None:
                self.before_update()
            clipping = max(1.0, norm / self.clip_norm) if self.clip_norm > 0.0 else 1.0
            self.optimizer.step(factor, scale * clipping)
            if expert_load is not None:
                self.model.move_router_biases(expert_load)
        self.optimizer.zero_grad()
        self._count(applied)
        return StepOutcome(loss, norm, applied, expert_load)

    def _count(self, applied: bool) -> None:
        self.loss_scale.update(applied)
        if applied:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if not self.loss_scale.dynamic and self.skipped_in_a_row > self.max_skipped:
            raise TrainingError(
                f"the loss or its gradients were not finite in {self.skipped_in_a_row} steps in a row "
                f"(training.max_skipped_steps is {self.max_skipped}). The weights are those of the last "
                "good step. Lower optimizer.learning_rate, lengthen schedule.warmup_tokens, or train "
                "with precision.dtype: float32."
            )

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from a checkpoint."""
        self.skipped = int(state.get("skipped", 0))
        self.skipped_in_a_row = int(state.get("skipped_in_a_row", 0))


def split_batch(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """Micro-batches of ``micro_batch_size`` samples; the last one may hold fewer."""
    return [batch[i : i + micro_batch_size] for i in range(0, len(batch), micro_batch_size)]
