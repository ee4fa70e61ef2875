"""What sharding over replicas, offloading and 8-bit products ask of a layout and a model."""

from __future__ import annotations

from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.pipeline_rules import SPLIT_SCHEDULES, splits_backward
from mtnlg.config.training import PrecisionConfig

FLOAT8_MULTIPLE = 16  # rows and columns that the GPUs' 8-bit products come in


def data_parallel_problems(layout: LayoutConfig) -> list[str]:
    """Every reason why replicas cannot share what ``layout`` lets them share; empty when they can."""
    sharding, size = layout.data_parallel_sharding, layout.data_parallel_shard_size
    problems = []
    if sharding == "hybrid" and size is None:
        problems.append(
            "layout.data_parallel_sharding is hybrid: say in layout.data_parallel_shard_size how many "
            "replicas make a group (those of one node, as a rule)."
        )
    if sharding != "hybrid" and size is not None:
        problems.append(
            f"layout.data_parallel_shard_size is {size}: only layout.data_parallel_sharding: hybrid has "
            f"groups, and it is {sharding}; leave it out or choose hybrid."
        )
    replicas = layout.data_parallel_size
    if sharding == "hybrid" and size is not None and replicas is not None and replicas % size:
        problems.append(
            f"layout.data_parallel_shard_size is {size}: it must divide layout.data_parallel_size "
            f"({replicas})."
        )
    replicas = (replicas or 1) * layout.context_parallel_size
    if replicas > 1 and sharding not in ("ddp", "zero1") and splits_backward(layout):
        others = "gpipe, 1f1b, interleaved_1f1b or looped_bfs"
        problems.append(
            f"layout.data_parallel_sharding is {sharding}: layout.pipeline_schedule "
            f"{layout.pipeline_schedule} computes the gradients of weights when their layer has long been "
            f"left ({', '.join(SPLIT_SCHEDULES)} do), and they could not be shared out by then; use zero1 "
            f"or ddp, or {others}."
        )
    return problems


def float8_problems(
    layout: LayoutConfig, model: MegatronModelConfig, precision: PrecisionConfig
) -> list[str]:
    """Every size of the layers' matrices that does not fit ``precision.fp8``; empty without it."""
    if not precision.fp8:
        return []
    tensor = layout.tensor_parallel_size
    problems = []
    if layout.async_tensor_parallel and tensor > 1:
        problems.append(
            "precision.fp8 is true: layout.async_tensor_parallel cannot cut 8-bit products into pieces; "
            "leave one of them out."
        )
    sizes = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size // tensor,
        "num_attention_heads": model.head_size * (model.num_attention_heads // tensor),
        "num_key_value_heads": model.head_size * max(1, model.key_value_heads // tensor),
    }
    problems += [
        f"precision.fp8 is true: model.{name} gives each rank's matrices a side of {size}, which must be "
        f"a multiple of {FLOAT8_MULTIPLE}."
        for name, size in sizes.items()
        if size % FLOAT8_MULTIPLE
    ]
    return problems
