"""What dividing experts asks of a layout."""

from __future__ import annotations

from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.moe import has_experts


def expert_layout_problems(layout: LayoutConfig, model: MegatronModelConfig) -> list[str]:
    """Every reason why the model's experts cannot be divided as ``layout`` asks; empty when they can.

    Args:
        layout: the layout asked for; while ``data_parallel_size`` is open nothing is said of it.
        model: the architecture.
    """
    size, tensor = layout.expert_parallel_size, layout.tensor_parallel_size
    if model.num_experts is None:
        if size == 1:
            return []
        return [
            f"layout.expert_parallel_size is {size}: the model has no experts (model.num_experts); leave "
            "it out."
        ]
    problems = []
    if model.num_experts % size:
        problems.append(
            f"layout.expert_parallel_size is {size}: it must divide model.num_experts "
            f"({model.num_experts})."
        )
    problems += sharing_problems(layout)
    if model.shared_expert_size % tensor:
        problems.append(
            f"layout.tensor_parallel_size is {tensor}: it must divide "
            f"model.shared_expert_intermediate_size ({model.shared_expert_size})."
        )
    if model.expert_ffn_size % tensor:
        problems.append(
            f"layout.tensor_parallel_size is {tensor}: it must divide model.moe_intermediate_size "
            f"({model.expert_ffn_size})."
        )
    return problems


def sharing_problems(layout: LayoutConfig) -> list[str]:
    """Why the ranks of ``layout`` cannot share experts; empty while ``data_parallel_size`` is open."""
    size = layout.expert_parallel_size
    if layout.data_parallel_size is None:
        return []
    ranks, what = _ranks_with_other_data(layout)
    if ranks % size == 0:
        return []
    return [
        f"layout.expert_parallel_size is {size}: experts are shared by ranks that run other data, so it "
        f"must divide {what} ({ranks})."
    ]


def has_dense_layers(model: MegatronModelConfig) -> bool:
    """Whether any layer has an MLP of ``model.intermediate_size``."""
    return not all(has_experts(model, layer) for layer in range(model.num_hidden_layers))


def _ranks_with_other_data(layout: LayoutConfig) -> tuple[int, str]:
    if layout.data_parallel_sharding == "hybrid":
        names = "layout.data_parallel_shard_size x layout.context_parallel_size"
        return layout.shard_size * layout.context_parallel_size, names
    names = "layout.data_parallel_size x layout.context_parallel_size"
    return (layout.data_parallel_size or 1) * layout.context_parallel_size, names
