"""Whether an adapter can be trained in a run: every reason why not, before any process starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtnlg.config.adapter import AdapterConfig

if TYPE_CHECKING:
    from mtnlg.config.layout import LayoutConfig
    from mtnlg.config.model import MegatronModelConfig
    from mtnlg.config.training import TrainingConfig


def encoder_problems(config: AdapterConfig) -> list[str]:
    """Every reason why an encoder-decoder cannot have this adapter; empty when it can."""
    problems = []
    if config.method == "prefix":
        problems.append(
            "method is prefix: an encoder-decoder has virtual tokens before what its encoder reads only; "
            "use prompt, lora or full."
        )
    if config.method == "prompt" and config.prompt_style != "prepend":
        problems.append(
            f"prompt_style is {config.prompt_style}: an encoder-decoder's virtual tokens stand before what "
            "its encoder reads; use prepend."
        )
    return problems


def adapter_problems(
    config: AdapterConfig,
    model: MegatronModelConfig,
    layout: LayoutConfig,
    sequence_length: int,
    training: TrainingConfig,
) -> list[str]:
    """Every reason why a laid-out model cannot have this adapter; empty when it can.

    Args:
        config: the adapter.
        model: the architecture.
        layout: how it is divided.
        sequence_length: tokens of one sample, without virtual ones.
        training: the engine's switches.
    """
    problems = []
    longest = sequence_length + config.num_positions
    has_rows = model.position_embedding == "learned"
    if config.num_positions and has_rows and longest > model.max_position_embeddings:
        problems.append(
            f"data.sequence_length is {sequence_length}: with {config.num_positions} virtual tokens a "
            f"sample has {longest}, and the model {model.max_position_embeddings} positions."
        )
    if config.num_positions and layout.context_parallel_size > 1:
        problems.append(
            f"layout.context_parallel_size is {layout.context_parallel_size}: virtual tokens are seen by "
            "all of a sequence, which ranks cannot share then; use lora, or 1."
        )
    if model.has_encoder:
        problems += encoder_problems(config)
    if config.dropout > 0.0 and training.activation_recomputation in ("operators", "budget"):
        problems.append(
            f"dropout is {config.dropout}: training.activation_recomputation "
            f"{training.activation_recomputation} makes results again, and a dropped one would be another; "
            "use full or none, or an adapter without dropout."
        )
    tensor = layout.tensor_parallel_size
    if config.num_positions and tensor > 1 and layout.sequence_parallel and longest % tensor:
        problems.append(
            f"num_virtual_tokens is {config.num_positions}: with layout.sequence_parallel, samples of "
            f"{longest} tokens must be divisible by layout.tensor_parallel_size ({tensor})."
        )
    rounds_inputs = model.quantize and (model.quantize_config or {}).get("activations") == "int8"
    if rounds_inputs and tensor > 1:
        problems.append(
            f"layout.tensor_parallel_size is {tensor}: quantize_config.activations int8 rounds inputs "
            "under a scale for each token, and ranks have parts of them; use float."
        )
    return problems
