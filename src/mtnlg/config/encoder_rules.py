"""What layouts an encoder-decoder can be divided by: every reason why not, before any process starts."""

from __future__ import annotations

from mtnlg.config.division import stated_counts
from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.pipeline_rules import SPLIT_SCHEDULES, splits_backward


def encoder_layout_problems(model: MegatronModelConfig, layout: LayoutConfig) -> list[str]:
    """Every reason why an encoder-decoder cannot be divided as ``layout`` asks; empty when it can."""
    if not model.has_encoder:
        return []
    problems = []
    if layout.context_parallel_size > 1:
        problems.append(
            f"layout.context_parallel_size is {layout.context_parallel_size}: an encoder-decoder's "
            "relative positions need a rank to have the whole sequence; choose 1, and more tensor- or "
            "data-parallel ranks."
        )
    if splits_backward(layout):
        problems.append(
            f"layout.pipeline_schedule is {layout.pipeline_schedule}: stages of an encoder-decoder send "
            f"several tensors, and {', '.join(SPLIT_SCHEDULES)} go back through one; use gpipe, 1f1b, "
            "interleaved_1f1b or looped_bfs."
        )
    counts = stated_counts(layout)
    if counts is not None and len(counts) > 1 and counts[-1] == 0:
        problems.append(
            f"layout.pipeline_layout is {layout.pipeline_layout!r}: the last stage of an encoder-decoder "
            "needs a layer of the decoder."
        )
    return problems
