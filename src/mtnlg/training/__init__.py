"""Training: loop, optimizers, schedules, checkpoints, metrics, preparation of a run's folder."""

from mtnlg.training.events import (
    RunStart,
    Sample,
    StepMetrics,
    TrainingCallback,
    TrainResult,
    ValidationMetrics,
)
from mtnlg.training.loop import train, train_on_rank
from mtnlg.training.prepare import prepare

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
