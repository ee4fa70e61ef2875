"""Rates, means and files of metrics: ``metrics.jsonl``, ``samples.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mtnlg.config import ConfigError
from mtnlg.training.events import Sample, StepMetrics, TrainingCallback, ValidationMetrics


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the GPU by this process, or of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Clock:
    """Training time over all parts of a resumed run, and the pauses that do not count as steps.

    Args:
        before: seconds that earlier parts of the run took.
        now: the time source, seconds.
    """

    def __init__(self, before: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._begin = now() - before

    def seconds(self) -> float:
        """Training time so far."""
        return self._now() - self._begin


def jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with numbers JSON does not know (nan, inf) as ``None``."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


class JsonlWriter(TrainingCallback):
    """Appends to ``metrics.jsonl`` (lines of ``kind`` ``train`` and ``validation``) and ``samples.jsonl``.

    Lines of steps after ``step`` are dropped first: a killed run may have written of steps that its
    last checkpoint does not know and that are now made again.

    Args:
        run_dir: the run's folder.
        step: the step the run goes on from.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._metrics, self._samples = run_dir / "metrics.jsonl", run_dir / "samples.jsonl"
        for path in (self._metrics, self._samples):
            drop_later_lines(path, step)

    def on_log(self, metrics: StepMetrics) -> None:
        """Append one line of means."""
        values = asdict(metrics)
        unsaid = ["progress", "eta_seconds", "skipped", *(["experts"] if metrics.experts is None else [])]
        for key in unsaid:
            del values[key]
        self._append(self._metrics, {"kind": "train", **values})

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Append one evaluation."""
        values = asdict(metrics)
        extra = values.pop("extra")
        self._append(self._metrics, {"kind": "validation", **values, **extra})

    def on_sample(self, sample: Sample) -> None:
        """Append one sample."""
        self._append(self._samples, asdict(sample))

    @staticmethod
    def _append(path: Path, values: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(values), ensure_ascii=False) + "\n")


def drop_later_lines(path: Path, step: int) -> None:
    """Remove lines of steps after ``step``, and a last line that was cut short."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
    if len(kept) < len(lines):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoardWriter(TrainingCallback):
    """Scalars for TensorBoard in ``RUN/tensorboard``, the same names as in ``metrics.jsonl``.

    Args:
        run_dir: the run's folder.
        step: the step the run goes on from; later points of a killed run are hidden.

    Raises:
        ConfigError: the ``tensorboard`` extra is not installed.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "logging.tensorboard is on and TensorBoard is not installed: "
                "pip install 'mtnlg[tensorboard]', or set logging.tensorboard: false."
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def on_log(self, metrics: StepMetrics) -> None:
        """Write the numbers of one line of metrics."""
        names = "loss learning_rate gradient_norm batch_size tokens_per_second mfu hfu memory_bytes"
        for name in f"{names} loss_scale tokens".split():
            self._writer.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)
        if metrics.experts is not None:
            for name in ("balance_loss", "z_loss", "largest_load"):
                self._writer.add_scalar(f"experts/{name}", getattr(metrics.experts, name), metrics.step)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Write one evaluation."""
        values = {"loss": metrics.loss, "perplexity": metrics.perplexity, **metrics.extra}
        for name, value in values.items():
            self._writer.add_scalar(f"validation/{name}", value, metrics.step)
        self._writer.flush()

    def on_sample(self, sample: Sample) -> None:
        """Write one sample as text."""
        self._writer.add_text(f"sample/{sample.prompt[:40]}", sample.text, sample.step)

    def on_end(self, result: object) -> None:
        """Close the files."""
        self._writer.close()
