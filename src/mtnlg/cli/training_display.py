"""Live progress of training: loss, tokens/s, MFU and ETA, and the events between the steps."""

from __future__ import annotations

import atexit
import sys
import time
from typing import IO, Any

from mtnlg.cli.terminal import duration, quantity
from mtnlg.training.events import (
    RunStart,
    Sample,
    StepMetrics,
    TrainingCallback,
    TrainResult,
    ValidationMetrics,
)

LINE_INTERVAL_SECONDS = 10.0  # between the lines of a log


class TrainingDisplay(TrainingCallback):
    """A bar that stays at the bottom of a terminal; one line now and then in a log.

    Args:
        stream: where to draw; ``None`` is stderr.
        show_samples: print the samples that are written on the way.
        line_interval_seconds: time between two lines where there is no terminal.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        show_samples: bool = True,
        line_interval_seconds: float = LINE_INTERVAL_SECONDS,
    ) -> None:
        self._stream = stream or sys.stderr
        self._shows_samples = show_samples
        self._interval = line_interval_seconds
        self._live: Any = None
        self._task: Any = None
        self._said = float("-inf")
        self._said_step = -1
        self._last: StepMetrics | None = None

    def on_start(self, start: RunStart) -> None:
        """Say what is trained where."""
        end = (
            ""
            if start.total_tokens is None
            else f", {quantity(start.total_tokens, 'tokens')} to go through"
        )
        ranks = "" if start.num_ranks == 1 else f" ({start.num_ranks} ranks)"
        verb = "going on from step " + str(start.step) if start.step else "training"
        self._print(
            f"{verb}: {quantity(start.num_parameters, 'parameters')} on {start.device}{ranks}, "
            f"peak {start.peak_flops / 1e9:.0f} GFLOP/s{end}; run folder {start.run_dir}"
        )
        if self._stream.isatty():
            self._live = _bar(self._stream)
            self._task = self._live.add_task("training", total=1.0, state="first step")
            self._live.start()
            atexit.register(self._live.stop)  # an error leaves no bar and no hidden cursor behind

    def on_step(self, metrics: StepMetrics) -> None:
        """Move the bar, or print a line when the last one is old enough."""
        self._last = metrics
        if self._live is not None:
            self._live.update(self._task, completed=metrics.progress, state=step_text(metrics))
        elif time.monotonic() - self._said >= self._interval:
            self._say(metrics)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """One line for each evaluation."""
        extra = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in metrics.extra.items())
        self._print(
            f"     step {metrics.step}: validation loss {metrics.loss:.4f}, "
            f"perplexity {metrics.perplexity:.4g}{extra}"
        )

    def on_sample(self, sample: Sample) -> None:
        """The samples written on the way."""
        if self._shows_samples:
            self._print(f"     sample: {sample.prompt}\N{BLACK VERTICAL RECTANGLE}{sample.text}")

    def on_message(self, message: str) -> None:
        """What the user should know."""
        self._print(f"     note: {message}")

    def on_end(self, result: TrainResult) -> None:
        """Take the bar away and say how the run ended."""
        if self._live is not None:
            atexit.unregister(self._live.stop)
            self._live.stop()
            self._live = None
        elif self._last is not None and self._last.step != self._said_step:
            self._say(self._last)
        self._print(
            f"stopped after {result.step} steps, {quantity(result.tokens, 'tokens')}, "
            f"{duration(result.seconds)} ({result.stop_reason})"
        )

    def _say(self, metrics: StepMetrics) -> None:
        self._said, self._said_step = time.monotonic(), metrics.step
        self._print(f"{metrics.progress:4.0%} {step_text(metrics)}")

    def _print(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def step_text(metrics: StepMetrics) -> str:
    """One step in one line: step, loss, rate, MFU, time left."""
    left = "" if metrics.eta_seconds is None else f", {duration(metrics.eta_seconds)} left"
    skipped = f", {metrics.skipped_steps} skipped" if metrics.skipped_steps else ""
    return (
        f"step {metrics.step}, loss {metrics.loss:.3f}, "
        f"{quantity(metrics.tokens_per_second, 'tokens')}/s, MFU {metrics.mfu:.0%}{skipped}{left}"
    )


def _bar(stream: IO[str]) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[state]}"),
        console=Console(file=stream),
        transient=True,
    )
