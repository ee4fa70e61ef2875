"""Small bases and conversations for tests of tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tests.training.helpers import Recorder

from mtnlg import MegatronLmModel, Tokenizer
from mtnlg.config import (
    BatchConfig,
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
    TuningConfig,
)
from mtnlg.parallel import build_mesh
from mtnlg.training import TrainResult, train_on_rank
from mtnlg.tuning import Tuning

WORDS = ["red", "blue", "green", "one", "two", "three", "cat", "dog"]
WORDS += ["bird", "sings", "runs", "sleeps", "yes", "no", "perhaps"]
LENGTH = 48


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS)] * 20, vocab_size=300)


def conversations(count: int = 24) -> list[dict[str, Any]]:
    """A question is two words; the answer is the same two in the other order."""
    made = []
    for number in range(count):
        turns = []
        for turn in range(1 + number % 3):
            first, second = (WORDS[(number * 5 + turn * 3 + i) % len(WORDS)] for i in (0, 7))
            turns += [
                {"role": "user", "content": f"{first} {second}"},
                {"role": "assistant", "content": f"{second} {first}"},
            ]
        made.append({"messages": turns})
    return made


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def write_base(folder: Path, **fields: Any) -> Path:
    """A Hugging Face folder of a small random model of the Llama family."""
    values: dict[str, Any] = dict(
        vocab_size=tokenizer().vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=96,
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function="swiglu",
        attention_bias=False,
        mlp_bias=False,
        init_method_std=0.1,
    )
    model = MegatronLmModel(MegatronModelConfig(**{**values, **fields}), tokenizer())
    model.save_pretrained(folder)
    return folder


def small_tuning(folder: Path, tuning: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A tuning run of 6 steps of 4 samples over ``folder/chats.jsonl`` into ``folder/run``."""
    base, data = folder / "base", folder / "chats.jsonl"
    if not base.exists():
        write_base(base)
    if not data.exists():
        write_lines(data, conversations())
    from mtnlg.training.model_files import open_model_files

    config = RunConfig(
        run_dir=str(folder / "run"),
        model=open_model_files(base).config,
        data=DataConfig(sequence_length=LENGTH),
        batch=BatchConfig(micro_batch_size=2, global_batch_size=4),
        stop=StopConfig(steps=6),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        schedule=ScheduleConfig(name="constant"),
        evaluation=EvaluationConfig(interval_steps=0, num_batches=0),
        checkpoint=CheckpointConfig(interval_steps=2, keep_last=100),
        logging=LoggingConfig(interval_steps=1),
        training=TrainingConfig(device="cpu", num_threads=1),
        tuning=TuningConfig(
            **{"base": str(base), "data": [str(data)], "validation_share": 0.2, **(tuning or {})}
        ),
    )
    return replace(config, **sections)


def prepared(config: RunConfig) -> RunConfig:
    return Tuning().prepare(config, lambda *_: None)


def tune_here(config: RunConfig, recorder: Recorder | None = None) -> TrainResult:
    """Tune in this process; ``config`` is prepared."""
    callbacks = [] if recorder is None else [recorder]
    return train_on_rank(config, build_mesh(LayoutConfig(data_parallel_size=1)), callbacks, work=Tuning())


def tune_laid_out(config: RunConfig) -> dict[str, Any]:
    """What one rank of ``config.layout`` runs; rank 0's losses and result."""
    recorder = Recorder()
    result = train_on_rank(config, build_mesh(config.layout), [recorder], work=Tuning())
    return {"losses": recorder.losses, "result": result}
