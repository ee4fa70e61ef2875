"""The whole config of a run, and the rules that cross its sections."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.adapter_rules import adapter_problems
from mtnlg.config.data import DataConfig, TokenizerConfig
from mtnlg.config.errors import ConfigError
from mtnlg.config.layout import LayoutConfig
from mtnlg.config.layout_rules import layout_problems
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.objective_rules import objective_problems
from mtnlg.config.prompt_tuning import prompt_adapter
from mtnlg.config.quantize import aware_problems
from mtnlg.config.training import (
    BatchConfig,
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    PrecisionConfig,
    ScheduleConfig,
    StopConfig,
    TrainingConfig,
)
from mtnlg.config.tuning import TuningConfig


@dataclass
class RunConfig:
    """Everything that decides a training run; saved as ``config.yaml`` in the run's folder.

    Args:
        run_dir: the folder that becomes the run.
        seed: of the initialisation, the dropout and the shuffles.
        preset: name of a model preset that ``model`` starts from.
        model: the architecture; without ``vocab_size`` a recipe takes the tokenizer's.
        tokenizer: which tokenizer, or the size to train.
        data: what to train on.
        layout: how the model is divided over ranks.
        optimizer: AdamW or Muon.
        schedule: learning rate over tokens.
        batch: batch sizes and their ramp.
        precision: number formats.
        stop: when training ends.
        evaluation: evaluation and samples during training.
        checkpoint: what is kept.
        logging: metrics.
        training: the engine's switches.
        tuning: the model that the run begins from and what of it is trained; ``None`` begins anew.

    Raises:
        ConfigError: naming every rule across sections that is broken.
    """

    run_dir: str = "runs/run"
    seed: int = 1234
    preset: str | None = None
    model: MegatronModelConfig = field(default_factory=MegatronModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    stop: StopConfig = field(default_factory=lambda: StopConfig(tokens=100_000_000))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    tuning: TuningConfig | None = None

    def __post_init__(self) -> None:
        own = prompt_adapter(self.model)
        if own is not None and self.tuning is not None and self.tuning.method == own.method:
            self.tuning = replace(self.tuning, adapter=own)  # the model's own fields say what is trained
        problems = cross_section_problems(
            self.model, self.data, self.layout, self.batch, self.training, self.precision
        )
        adapter = self.adapter
        sizes = self.layout.tensor_parallel_size
        problems += aware_problems(self.model.quantize, sizes, trains_adapter=adapter is not None)
        if adapter is not None:
            length = self.data.sequence_length
            if self.tuning is not None:  # which cuts conversations to what there is room for
                length = min(length, adapter.longest_text or length)
            elif adapter.longest_text is not None and length > adapter.longest_text:
                problems.append(
                    f"data.sequence_length is {length}: model.prompt_tuning_max_seq_length leaves "
                    f"{adapter.longest_text} tokens for text."
                )
            problems += adapter_problems(adapter, self.model, self.layout, length, self.training)
        if problems:
            raise ConfigError(problems)

    @property
    def adapter(self) -> AdapterConfig | None:
        """What is trained beside weights that stay as they are; ``None`` trains the model itself."""
        if self.tuning is not None and self.tuning.trains_adapter:
            return self.tuning.adapter
        return prompt_adapter(self.model)

    def to_dict(self) -> dict[str, Any]:
        """The config as nested plain values."""
        return asdict(self)


def cross_section_problems(
    model: MegatronModelConfig,
    data: DataConfig,
    layout: LayoutConfig,
    batch: BatchConfig,
    training: TrainingConfig | None = None,
    precision: PrecisionConfig | None = None,
) -> list[str]:
    """Every rule between sections that is broken."""
    problems = []
    length, longest = data.sequence_length, model.max_position_embeddings
    if model.position_embedding == "learned" and length > longest:
        problems.append(
            f"data.sequence_length is {length}: the model has only {longest} positions "
            "(model.max_position_embeddings)."
        )
    replicas = layout.data_parallel_size or 1
    for name, size in (("global_batch_size", batch.global_batch_size), ("ramp_start", batch.ramp_start)):
        step = batch.micro_batch_size * replicas
        if size is not None and size % step:
            problems.append(
                f"batch.{name} is {size}: it must be a multiple of micro_batch_size "
                f"({batch.micro_batch_size}) times layout.data_parallel_size ({replicas})."
            )
    # Steps of a ramp may have other numbers of micro-batches: they run a schedule that takes any.
    micro_batches = max(1, batch.global_batch_size // (batch.micro_batch_size * replicas))
    problems += layout_problems(layout, model, length, micro_batches, training, precision)
    if model.quantize and precision is not None and precision.fp8:
        problems.append("precision.fp8 is true: with model.quantize the products are rounded already.")
    return problems + objective_problems(model, data, layout)
