"""The training loop on one rank: the same code for one process and for any layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mtnlg.config import RunConfig
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.model import ParallelModel
from mtnlg.tokens.batch import Batch
from mtnlg.tokens.prefetch import prefetch
from mtnlg.training import resume
from mtnlg.training.checkpoint_files import read_state, remove_leftovers
from mtnlg.training.checkpoints import load_tensors, newest_good_checkpoint
from mtnlg.training.events import Callbacks, RunStart, StepMetrics, TrainResult, ValidationMetrics
from mtnlg.training.interrupts import Interrupts
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.meter import Meter
from mtnlg.training.metrics import Clock, JsonlWriter, TensorBoardWriter
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.samples import write_samples
from mtnlg.training.saving import CheckpointSaver, Parts
from mtnlg.training.schedules import BatchRamp, make_schedule
from mtnlg.training.step import TrainingStep, split_batch
from mtnlg.training.stopping import Position, StopRules
from mtnlg.training.validation import Validation
from mtnlg.training.work import Work

EvaluationHook = Callable[[ParallelModel, int], dict[str, float]]


class Trainer:
    """A run on this rank, from its newest checkpoint if it has one.

    Args:
        config: prepared: token files exist and the vocabulary's size is known.
        mesh: this rank's place.
        callbacks: told on rank 0.
        evaluate: called on every rank at each evaluation with the model and the step; what it returns
            goes into the metrics.
        work: what is trained on and begun from; ``None`` is training from the beginning.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        callbacks: Callbacks | None = None,
        evaluate: EvaluationHook | None = None,
        work: Work | None = None,
    ) -> None:
        self.config, self.mesh, self.work = config, mesh, work or Work()
        self.callbacks = (callbacks or Callbacks()) if mesh.is_main else Callbacks()
        self._evaluate_hook = evaluate
        self.model = self.work.lay_out(config, mesh)
        self.optimizer = Optimizer(self.model.named_parameters(), config.optimizer, self.model.adapter)
        self.saver = CheckpointSaver(config.run_dir, config.checkpoint, mesh)
        self.step = TrainingStep(
            self.model,
            self.optimizer,
            config.optimizer,
            LossScale(config.precision),
            config.training.max_skipped_steps,
            before_update=self.saver.wait_for_copy,
        )
        self.stream = self.work.training_stream(config)
        self.validation = Validation.of(config, self.work)
        self.schedule = make_schedule(config.schedule)
        self.ramp = BatchRamp(config.batch, config.data.sequence_length, mesh.num_replicas)
        steps, length = config.stop.steps, config.data.sequence_length
        self.stop = StopRules(config.stop, steps and self.ramp.samples_after(steps) * length)
        self.position = Position()
        self.samples = 0
        self._validation_loss: float | None = None
        self._first_validation_loss: float | None = None
        self._last_line: StepMetrics | None = None
        self._checkpoint: Path | None = None
        self._saved = self._evaluated = (-1, 0.0)  # step and seconds of the last one
        self._resume()

    def run(self) -> TrainResult:
        """Train until a stop rule or a signal ends it, save, and say how it ended.

        Raises:
            TrainingError: too many bad steps, or a checkpoint could not be saved.
        """
        self.meter = Meter(self.config, self.mesh)
        self._open_files()
        self.model.train()
        self.clock = Clock(self.position.seconds)
        self._saved = (self._saved[0], self.position.seconds)
        self.saver.prepare(self._parts())
        if self.config.training.activation_recomputation == "selective" and self.mesh.device.type == "cuda":
            self.callbacks.on_message(
                "training.activation_recomputation: selective changes nothing on a GPU, whose attention "
                "kernels keep no attention weights; use operators, budget or full to keep less."
            )
        try:
            with Interrupts(self.callbacks.on_message) as interrupts:
                return self._train(interrupts)
        except Exception as error:
            self.saver.wait_after(error)
            raise

    def _train(self, interrupts: Interrupts) -> TrainResult:
        if self.position.step == 0 and self.work.evaluates_the_start:
            self._evaluate()
            self._first_validation_loss = self._validation_loss
        for size, batch in self._batches():
            num_valid, signal = self._agree(batch, interrupts.received)
            reason = "signal" if signal else self.stop.reason(self.position)
            if reason:
                return self._end(reason, signal)
            self._train_step(batch, size, num_valid)
        raise AssertionError("the training stream has no end")

    def _batches(self) -> Iterator[tuple[int, Batch]]:
        """This replica's batches from here on, each with the size of the whole; read ahead for a GPU."""
        mesh = self.mesh

        def requests() -> Iterator[tuple[int, int]]:
            position = self.samples
            while True:
                yield position, (size := self.ramp.size(position))
                position += size

        sizes = (size for _, size in requests())
        if mesh.device.type == "cuda":
            return zip(sizes, prefetch(self.stream, requests(), mesh.replica, mesh.num_replicas))
        return (
            (size, self.stream.batch(position, size, mesh.replica, mesh.num_replicas))
            for position, size in requests()
        )

    def _agree(self, batch: Batch, signal: int) -> tuple[int, int]:
        """Valid tokens of the step and the signal received, the same on every rank.

        Rank 0's clock becomes everyone's too: who stops by time must stop together. So must all when a
        checkpoint that was being written has failed.
        """
        seconds = self.clock.seconds() if self.mesh.is_main else 0.0
        ours = [batch.num_valid_tokens / self.mesh.layout.model_parallel_size, seconds]
        ours += [float(signal == number) for number in (2, 15)] + [float(self.saver.has_failed)]
        sums = torch.tensor(ours, dtype=torch.float64, device=self.mesh.device)
        valid, seconds, interrupted, terminated, failed = self.mesh.sum_over_ranks(sums).tolist()
        if failed:
            self.saver.wait()
        self.position.seconds = seconds
        return round(valid), 2 if interrupted else 15 if terminated else 0

    def _train_step(self, batch: Batch, size: int, num_valid: int) -> None:
        self.meter.begin_step()
        tokens = (self.samples + size) * self.config.data.sequence_length
        total = self.config.schedule.decay_tokens or self.stop.schedule_total(tokens, self.position)
        factor = self.schedule.factor(tokens, total)
        scale = self.step.loss_scale.value
        self.model.seed_dropout(self.config.seed, self.position.step)
        batches = split_batch(batch, self.config.batch.micro_batch_size)
        outcome = self.step.run(batches, num_valid, factor)
        self.samples += size
        self.position.step += 1
        self.position.tokens = tokens
        metrics = self.meter.end_step(
            outcome,
            size,
            self.position,
            self.stop.progress(self.position),
            factor,
            scale,
            self.step.skipped,
        )
        if metrics.skipped:
            self.callbacks.on_message(
                f"step {metrics.step} skipped: its loss or gradients were not finite"
                + (f" at loss scale {scale:g}." if self.step.loss_scale.dynamic else ".")
            )
        self.callbacks.on_step(metrics)
        if metrics.step % self.config.logging.interval_steps == 0:
            self._log(metrics)
        self._last_step = metrics
        self._after_step()

    def _log(self, metrics: StepMetrics) -> None:
        self._last_line = self.meter.log_line(metrics)
        self.callbacks.on_log(self._last_line)

    def _after_step(self) -> None:
        self._tell_of_checkpoints()
        step, seconds = self.position.step, self.position.seconds
        every = self.config.evaluation.interval_steps
        if every and step % every == 0:
            self._evaluate()
        checkpoint = self.config.checkpoint
        due = bool(checkpoint.interval_steps) and step % checkpoint.interval_steps == 0
        minutes = checkpoint.interval_minutes
        if due or (minutes is not None and seconds - self._saved[1] >= 60.0 * minutes):
            self._save()

    def _evaluate(self) -> None:
        step, seconds = self.position.step, self.position.seconds
        if self.validation is None or self._evaluated[0] == step:
            return
        loss, num_tokens = self.validation.run(self.model)
        extra = self.work.evaluate(self.config, self.model)
        extra |= self._evaluate_hook(self.model, step) if self._evaluate_hook else {}
        improved = self.stop.observe(loss)
        self._validation_loss, self._evaluated = loss, (step, seconds)
        perplexity = math.exp(min(loss, 700.0))
        self.callbacks.on_validation(
            ValidationMetrics(
                step, self.position.tokens, loss, perplexity, num_tokens, improved, seconds, extra
            )
        )
        write_samples(self.model, self.config, step, self.callbacks.on_sample)

    def _save(self, is_last: bool = False) -> None:
        step = self.position.step
        if self._saved[0] != step:
            self.saver.save(step, self._parts(), self._state(), is_last)
            self._saved = (step, self.position.seconds)
        if is_last:
            self.saver.wait()

    def _tell_of_checkpoints(self) -> None:
        for folder, step in self.saver.take_finished():
            self._checkpoint = folder
            self.callbacks.on_checkpoint(str(folder), step)

    def _parts(self) -> Parts:
        weights = self.work.saved_weights(self.config, self.model)
        return {"weights": weights, "optimizer": self.optimizer.state_dict()}

    def _state(self) -> dict[str, Any]:
        return {
            "format": resume.STATE_FORMAT,
            **asdict(self.position),
            "samples": self.samples,
            "optimizer_steps": self.optimizer.steps,
            "data": self.stream.state(self.samples),
            "loss_scale": self.step.loss_scale.state(),
            "skipping": self.step.state(),
            "stopping": self.stop.state(),
            "validation_loss": self._validation_loss,
            "first_validation_loss": self._first_validation_loss,
            "evaluated_step": self._evaluated[0],
            "config": self.config.to_dict(),
        }

    def _resume(self) -> None:
        if self.mesh.is_main:
            remove_leftovers(self.config.run_dir)
        folder = newest_good_checkpoint(self.config.run_dir, self.mesh, self.callbacks.on_message)
        self.work.begin(self.config, self.model, resumes=folder is not None)
        if folder is None:
            return
        state = read_state(folder)
        resume.check_same_run(self.config, state["config"])
        self.stream.check(state["data"])
        for part, tensors in self._parts().items():
            load_tensors(folder, part, tensors, self.mesh)
        self.optimizer.steps = int(state["optimizer_steps"])
        self.position = Position(int(state["step"]), int(state["tokens"]), float(state["seconds"]))
        self.samples = int(state["samples"])
        self.step.loss_scale.load_state(state["loss_scale"])
        self.step.load_state(state["skipping"])
        self.stop.load_state(state["stopping"])
        self._validation_loss = state["validation_loss"]
        self._first_validation_loss = state.get("first_validation_loss")
        self._evaluated = (int(state["evaluated_step"]), 0.0)
        self._checkpoint, self._saved = folder, (self.position.step, self.position.seconds)
        self.callbacks.on_message(f"going on from step {self.position.step} ({folder}).")

    def _open_files(self) -> None:
        if not self.mesh.is_main:
            return
        run_dir, step = Path(self.config.run_dir), self.position.step
        self.callbacks.add(JsonlWriter(run_dir, step))
        if self.config.logging.tensorboard:
            self.callbacks.add(TensorBoardWriter(run_dir, step))
        device = self.mesh.device
        self.callbacks.on_start(
            RunStart(
                run_dir=str(run_dir),
                num_parameters=self.config.model.num_parameters,
                step=step,
                total_tokens=self.stop.total_tokens,
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                num_ranks=self.mesh.num_ranks,
                peak_flops=self.meter.peak,
            )
        )

    def _end(self, reason: str, signal: int) -> TrainResult:
        if self.meter.has_unlogged:
            self._log(self._last_step)
        if reason != "signal":
            self._evaluate()
        self._save(is_last=True)
        self.work.finish(self.config, self.model, self.mesh)
        self._tell_of_checkpoints()
        best = self.stop.best_loss
        result = TrainResult(
            run_dir=self.config.run_dir,
            **asdict(self.position),
            loss=self._last_line.loss if self._last_line else None,
            validation_loss=self._validation_loss,
            best_validation_loss=None if math.isinf(best) else best,
            first_validation_loss=self._first_validation_loss,
            stop_reason=reason,
            exit_code=Interrupts.exit_code(signal),
            checkpoint=str(self._checkpoint) if self._checkpoint else None,
        )
        self.callbacks.on_end(result)
        return result
