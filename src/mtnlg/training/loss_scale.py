"""Dynamic loss scaling for fp16 (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

from mtnlg.config import PrecisionConfig, TrainingError


class LossScale:
    """What the loss is multiplied by before the backward pass; 1 and fixed unless fp16 trains.

    The scale doubles after ``loss_scale_window`` good steps in a row and halves at every step whose
    gradients overflow.

    Args:
        config: first scale, window and smallest scale.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        self.dynamic = config.dtype == "fp16"
        self.value = config.initial_loss_scale if self.dynamic else 1.0
        self.good_steps = 0
        self._window = config.loss_scale_window
        self._smallest = config.min_loss_scale

    def update(self, finite: bool) -> None:
        """Learn from one step.

        Args:
            finite: whether its gradients were.

        Raises:
            TrainingError: the scale would fall below the smallest one.
        """
        if not self.dynamic:
            return
        if finite:
            self.good_steps += 1
            if self.good_steps == self._window:
                self.value, self.good_steps = self.value * 2.0, 0
            return
        self.value, self.good_steps = self.value / 2.0, 0
        if self.value < self._smallest:
            raise TrainingError(
                f"the fp16 loss scale fell below {self._smallest:g}: gradients overflow at every scale. "
                "Lower optimizer.learning_rate, or train with precision.dtype: bf16."
            )

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint; ignored where the scale is fixed."""
        if self.dynamic and state.get("value", 1.0) != 1.0:
            self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
