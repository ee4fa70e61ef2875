"""Whether ranks can share each sequence: every reason why not, before any process starts."""

from __future__ import annotations

import math

from mtnlg.config.attention_rules import follows_length
from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig


def context_problems(layout: LayoutConfig, model: MegatronModelConfig, sequence_length: int) -> list[str]:
    """Every reason why the context parallelism of ``layout`` does not fit; empty when it fits.

    Args:
        layout: the layout asked for.
        model: the architecture to be divided.
        sequence_length: tokens of one sample.
    """
    context, tensor = layout.context_parallel_size, layout.tensor_parallel_size
    if context == 1:
        return []
    problems = []
    is_ring = layout.context_parallel_method == "ring"
    chunks = 2 if is_ring else 1  # of each rank: an early and a late one balance the work
    shards = tensor if layout.sequence_parallel else 1
    divisor = context * math.lcm(chunks, shards)
    if sequence_length % divisor:
        why = " of two chunks" if is_ring else ""
        why += f", each split over {shards} tensor-parallel ranks" if shards > 1 else ""
        problems.append(
            f"data.sequence_length is {sequence_length}: layout.context_parallel_size {context} "
            f"({layout.context_parallel_method}) cuts it into {context} equal parts{why}; make it a "
            f"multiple of {divisor}."
        )
    heads = model.num_attention_heads // tensor
    if not is_ring and heads % context:
        problems.append(
            f"layout.context_parallel_size is {context}: all-to-all attention deals out heads, and each "
            f"rank has {heads} (model.num_attention_heads / layout.tensor_parallel_size); choose a size "
            "that divides them, or layout.context_parallel_method: ring."
        )
    return problems + _attention_problems(model, context)


def _attention_problems(model: MegatronModelConfig, context: int) -> list[str]:
    """What attention over parts of a sequence does not know."""
    fields = {
        "sliding_window": model.sliding_window is not None,
        "attention_softcap": model.attention_softcap is not None,
        "position_embedding": model.position_embedding == "alibi",
        "rotary_scaling": follows_length(model),
    }
    return [
        f"layout.context_parallel_size is {context}: model.{name} ({getattr(model, name)}) needs a rank to "
        "have the whole sequence; choose 1, and more tensor- or data-parallel ranks."
        for name, is_in_the_way in fields.items()
        if is_in_the_way
    ]
