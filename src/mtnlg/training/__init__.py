"""Training: loop, optimizers, schedules, checkpoints, metrics, preparation of a run's folder."""

from typing import TYPE_CHECKING, Any

from mtnlg.training.events import (
    RunStart,
    Sample,
    StepMetrics,
    TrainingCallback,
    TrainResult,
    ValidationMetrics,
)
from mtnlg.training.prepare import prepare

if TYPE_CHECKING:
    from mtnlg.training.loop import train, train_on_rank

__all__ = [
    "RunStart",
    "Sample",
    "StepMetrics",
    "TrainResult",
    "TrainingCallback",
    "ValidationMetrics",
    "prepare",
    "train",
    "train_on_rank",
]


def __getattr__(name: str) -> Any:
    # Who opens a trained run needs none of the engine, whose imports take seconds.
    if name in ("train", "train_on_rank"):
        from mtnlg.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
