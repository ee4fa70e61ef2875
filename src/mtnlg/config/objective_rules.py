"""What an objective and an encoder ask of each other, of the layout and of the sequence length."""

from __future__ import annotations

from mtnlg.config.data import DataConfig
from mtnlg.config.errors import ConfigError
from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig


def objective_problems(model: MegatronModelConfig, data: DataConfig, layout: LayoutConfig) -> list[str]:
    """Every reason why ``data.objective`` and the model do not go together; empty when they do.

    Args:
        model: the architecture.
        data: what is predicted, and of how many tokens.
        layout: how the model is divided.
    """
    objective = data.objective
    if objective.is_causal:
        # Conversations that a model is tuned on say themselves what is read and written.
        problems = _target_problems(model, data, layout)
        if model.has_encoder and (data.blend or data.sources):
            problems.append(
                "data.objective.name is causal: an encoder-decoder reads one text and writes another; "
                "choose span_corruption, prefix_lm or ul2."
            )
        return problems
    try:
        objective.text_length(data.sequence_length, model.has_encoder)
    except ConfigError as error:
        return error.problems
    problems = _target_problems(model, data, layout)
    if layout.context_parallel_size > 1:
        problems.append(
            f"layout.context_parallel_size is {layout.context_parallel_size}: data.objective.name "
            f"{objective.name} lets tokens see what follows them, which ranks that share a sequence do "
            "not; choose 1, and more tensor- or data-parallel ranks."
        )
    return problems


def _target_problems(model: MegatronModelConfig, data: DataConfig, layout: LayoutConfig) -> list[str]:
    """What of ``data.objective.target_length``, given or derived, does not fit."""
    given = data.objective.target_length
    if not model.has_encoder:
        if given is None:
            return []
        return [
            f"data.objective.target_length is {given}: a decoder reads input and target in one sequence "
            "(data.sequence_length); leave it out."
        ]
    length = data.target_length(has_encoder=True)
    if layout.sequence_parallel and length % layout.tensor_parallel_size:
        return [
            f"data.objective.target_length is {length}: with layout.sequence_parallel it must be "
            f"divisible by layout.tensor_parallel_size ({layout.tensor_parallel_size}); set it so, or "
            "layout.sequence_parallel to false."
        ]
    return []
