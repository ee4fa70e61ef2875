"""Whether a layout fits a model: every reason why not, before any process starts."""

from __future__ import annotations

from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig


def layout_problems(
    layout: LayoutConfig, model: MegatronModelConfig, sequence_length: int, micro_batches: int
) -> list[str]:
    """Every reason why ``layout`` does not fit ``model``; empty when it fits.

    Args:
        layout: the layout asked for.
        model: the architecture to be divided.
        sequence_length: tokens of one sample.
        micro_batches: micro-batches each replica runs in one step.
    """
    tensor, pipeline = layout.tensor_parallel_size, layout.pipeline_parallel_size
    problems = []
    for name, count in (
        ("num_attention_heads", model.num_attention_heads),
        ("intermediate_size", model.ffn_size),
    ):
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
    if pipeline > model.num_hidden_layers:
        problems.append(
            f"layout.pipeline_parallel_size is {pipeline}: more stages than "
            f"model.num_hidden_layers ({model.num_hidden_layers})."
        )
    if layout.pipeline_schedule == "1f1b" and pipeline > 1 and micro_batches < pipeline:
        problems.append(
            f"layout.pipeline_parallel_size is {pipeline}: each replica needs at least as many "
            f"micro-batches a step as stages, and has {micro_batches}; raise "
            "batch.global_batch_size, lower batch.micro_batch_size, or use "
            "layout.pipeline_schedule: gpipe."
        )
    return problems
