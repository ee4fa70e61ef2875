"""Whether a layout fits a model: every reason why not, before any process starts."""

from __future__ import annotations

from mtnlg.config.context_rules import context_problems
from mtnlg.config.data_rules import data_parallel_problems, float8_problems
from mtnlg.config.encoder_rules import encoder_layout_problems
from mtnlg.config.expert_rules import expert_layout_problems, has_dense_layers
from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.pipeline_rules import pipeline_problems
from mtnlg.config.tensor_rules import async_tensor_problems
from mtnlg.config.training import PrecisionConfig, TrainingConfig


def layout_problems(
    layout: LayoutConfig,
    model: MegatronModelConfig,
    sequence_length: int,
    micro_batches: int,
    training: TrainingConfig | None = None,
    precision: PrecisionConfig | None = None,
) -> list[str]:
    """Every reason why ``layout`` does not fit ``model``; empty when it fits.

    Args:
        layout: the layout asked for.
        model: the architecture to be divided.
        sequence_length: tokens of one sample.
        micro_batches: micro-batches each replica runs in one step.
        training: the engine's switches; ``None`` is the defaults.
        precision: number formats; ``None`` is the defaults.
    """
    tensor = layout.tensor_parallel_size
    problems = []
    sizes = [("num_attention_heads", model.num_attention_heads)]
    sizes += [("intermediate_size", model.ffn_size)] if has_dense_layers(model) else []
    for name, count in sizes:
        if count % tensor:
            problems.append(
                f"layout.tensor_parallel_size is {tensor}: it must divide model.{name} ({count})."
            )
    key_value_heads = model.key_value_heads
    if key_value_heads % tensor and tensor % key_value_heads:
        problems.append(
            f"layout.tensor_parallel_size is {tensor}: it must divide model.num_key_value_heads "
            f"({key_value_heads}) or be a multiple of it (ranks then share key and value heads)."
        )
    if -(-model.vocab_size // tensor) * (tensor - 1) >= model.vocab_size:
        problems.append(
            f"layout.tensor_parallel_size is {tensor}: the last rank would hold none of the "
            f"{model.vocab_size} vocabulary entries."
        )
    if tensor > 1 and layout.sequence_parallel and sequence_length % tensor:
        problems.append(
            f"data.sequence_length is {sequence_length}: with layout.sequence_parallel it must be "
            f"divisible by layout.tensor_parallel_size ({tensor})."
        )
    problems += async_tensor_problems(layout, training or TrainingConfig())
    problems += context_problems(layout, model, sequence_length)
    problems += expert_layout_problems(layout, model)
    problems += data_parallel_problems(layout)
    problems += float8_problems(layout, model, precision or PrecisionConfig())
    problems += pipeline_problems(layout, model, micro_batches, training or TrainingConfig())
    problems += encoder_layout_problems(model, layout)
    return problems
