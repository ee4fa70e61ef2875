"""The config of the demo: as much as two CPU cores learn in a few minutes."""

from __future__ import annotations

from pathlib import Path

from mtnlg.config.data import DataConfig, SourceEntry, TokenizerConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.run import RunConfig
from mtnlg.config.training import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    StopConfig,
)

DEMO_MINUTES = 3.0
DEMO_VOCAB_SIZE = 6144
DEMO_PROMPTS = {  # texts to continue, and the tokens to add
    "秋夜\n": 40,
    "外婆": 80,
    "“老板，": 60,
    "The value of": 50,
    "class Reader:\n": 60,
}


def demo_config(
    run_dir: str | Path,
    english: str | Path,
    code: str | Path,
    chinese: str | Path | None = None,
    minutes: float = DEMO_MINUTES,
) -> RunConfig:
    """A small decoder of the Qwen3 family, trained on a blend for a fixed time.

    Args:
        run_dir: the folder that becomes the run.
        english: documents in English.
        code: documents of Python code.
        chinese: documents in Chinese; ``None`` trains without.
        minutes: of training.

    Raises:
        ConfigError: ``minutes`` is not above 0.
    """
    weights = {english: 0.35, code: 0.25, chinese: 0.4}
    sources = [SourceEntry(str(path), weight) for path, weight in weights.items() if path is not None]
    model = MegatronModelConfig(
        vocab_size=DEMO_VOCAB_SIZE,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=704,
        max_position_embeddings=512,
        position_embedding="rotary",
        normalization="rmsnorm",
        activation_function="swiglu",
        attention_bias=False,
        mlp_bias=False,
        qk_normalization=True,
    )
    return RunConfig(
        run_dir=str(run_dir),
        model=model,
        tokenizer=TokenizerConfig(vocab_size=DEMO_VOCAB_SIZE, sets_vocab_size=True),
        data=DataConfig(sources=sources, split="90,5,5", sequence_length=256),
        optimizer=OptimizerConfig(name="muon", learning_rate=4e-3, muon_learning_rate=0.02),
        schedule=ScheduleConfig(
            name="wsd", warmup_tokens=40_000, wsd_decay_share=0.4, min_learning_rate_ratio=0.02
        ),
        batch=BatchConfig(micro_batch_size=8, global_batch_size=8),
        stop=StopConfig(minutes=minutes),
        evaluation=EvaluationConfig(interval_steps=100, num_batches=6),
        checkpoint=CheckpointConfig(interval_steps=0, interval_minutes=0.5, keep_last=1),
        logging=LoggingConfig(interval_steps=5),
    )
