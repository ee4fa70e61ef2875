"""Small runs for tests."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtnlg.config import (
    BatchConfig,
    BlendEntry,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    LayoutConfig,
    LoggingConfig,
    MegatronModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    StopConfig,
    TrainingConfig,
    TrainingError,
)
from mtnlg.parallel import build_mesh
from mtnlg.tokens.token_writer import TokenFileWriter
from mtnlg.training import (
    StepMetrics,
    TrainingCallback,
    TrainResult,
    ValidationMetrics,
    tensor_files,
    train_on_rank,
)
from mtnlg.training.trainer import Trainer

VOCAB_SIZE, LENGTH = 37, 16


def write_tokens(prefix: Path, documents: int = 60) -> None:
    """Documents that count up by threes from different starts: a pattern a tiny model learns."""
    with TokenFileWriter(prefix, VOCAB_SIZE) as writer:
        for number in range(documents):
            writer.add_document([(number + 3 * i) % VOCAB_SIZE for i in range(20 + number % 13)])


def small_config(folder: Path, **sections: Any) -> RunConfig:
    """A run of 6 steps of 8 sequences over ``folder/tokens`` into ``folder/run``."""
    if not (folder / "tokens.idx").exists():
        write_tokens(folder / "tokens")
    run_dir = folder / "run"
    run_dir.mkdir(exist_ok=True)
    model = MegatronModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_dropout=0.1,
        tie_word_embeddings=True,
    )
    config = RunConfig(
        run_dir=str(run_dir),
        model=model,
        data=DataConfig(blend=[BlendEntry(str(folder / "tokens"))], sequence_length=LENGTH, split="8,2,0"),
        batch=BatchConfig(micro_batch_size=2, global_batch_size=8),
        stop=StopConfig(steps=6),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(name="constant"),
        evaluation=EvaluationConfig(interval_steps=0, num_batches=3),
        checkpoint=CheckpointConfig(interval_steps=2, keep_last=100),
        logging=LoggingConfig(interval_steps=1),
        training=TrainingConfig(device="cpu", num_threads=1),
    )
    return replace(config, **sections)


class Recorder(TrainingCallback):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.validations: list[ValidationMetrics] = []
        self.messages: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        self.validations.append(metrics)

    def on_message(self, message: str) -> None:
        self.messages.append(message)

    @property
    def losses(self) -> dict[int, float]:
        return {metrics.step: metrics.loss for metrics in self.steps}


def train_here(config: RunConfig, *callbacks: TrainingCallback) -> TrainResult:
    """Train in this process, without preparation."""
    return train_on_rank(config, build_mesh(LayoutConfig(data_parallel_size=1)), callbacks)


def train_laid_out(config: RunConfig) -> dict[str, Any]:
    """What one rank of ``config.layout`` runs; returns rank 0's result and losses."""
    recorder = Recorder()
    result = train_on_rank(config, build_mesh(config.layout), [recorder])
    return {"losses": recorder.losses, "result": result, "messages": recorder.messages}


def train_with_full_disk(config: RunConfig, rank: int) -> str:
    """Train while one rank's disk is full; returns the error that this rank got."""
    mesh = build_mesh(config.layout)

    def write_data(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = tensor_files.TensorWriter.write_data
    if mesh.rank == rank:
        tensor_files.TensorWriter.write_data = write_data
    try:
        train_on_rank(config, mesh)
    except TrainingError as error:
        return str(error)
    finally:
        tensor_files.TensorWriter.write_data = original
    return ""


def load_and_save(config: RunConfig, run_dir: str) -> None:
    """Load the newest checkpoint into ``config.layout`` and save it into another folder."""
    trainer = Trainer(config, build_mesh(config.layout))
    trainer.saver.run_dir = run_dir
    trainer._saved = (-1, 0.0)
    trainer._save(is_last=True)


def metrics_lines(config: RunConfig, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of one kind."""
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]
