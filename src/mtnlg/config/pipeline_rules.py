"""What each pipeline schedule asks of a layout, and what it does not go together with."""

from __future__ import annotations

from mtnlg.config.division import division_problems
from mtnlg.config.layout import LOOPED_SCHEDULES, V_SCHEDULES, LayoutConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.training import TrainingConfig

# These run the gradients of inputs and of weights apart, and fill waiting time with the latter.
SPLIT_SCHEDULES = ("interleaved_zero_bubble", "zbv", "dualpipev")


def splits_backward(layout: LayoutConfig) -> bool:
    """Whether weight gradients are computed apart from those of the inputs."""
    return layout.pipeline_parallel_size > 1 and layout.pipeline_schedule in SPLIT_SCHEDULES


def pipeline_problems(
    layout: LayoutConfig, model: MegatronModelConfig, micro_batches: int, training: TrainingConfig
) -> list[str]:
    """Every reason why the model cannot be pipelined as ``layout`` asks; empty when it can.

    Args:
        layout: the layout asked for.
        model: the architecture to be divided.
        micro_batches: micro-batches each replica runs in one step.
        training: recomputation and compilation, which some schedules exclude.
    """
    problems = division_problems(model, layout) + _stages_problems(layout)
    if layout.pipeline_parallel_size > 1:
        problems += _micro_batch_problems(layout, micro_batches)
        problems += _split_problems(layout, training)
    return problems


def takes(layout: LayoutConfig, micro_batches: int) -> bool:
    """Whether the schedule itself can run this many micro-batches."""
    return not _micro_batch_problems(layout, micro_batches)


def _stages_problems(layout: LayoutConfig) -> list[str]:
    wanted, schedule = layout.stages_per_rank, layout.pipeline_schedule
    if wanted is None or (wanted == 1 and schedule not in V_SCHEDULES):
        return []
    name = f"layout.stages_per_rank is {wanted}"
    if layout.pipeline_parallel_size == 1:
        return [f"{name}: it needs layout.pipeline_parallel_size of at least 2; leave it out."]
    if schedule in V_SCHEDULES and wanted != 2:
        return [f"{name}: layout.pipeline_schedule {schedule} runs 2 stages on each rank; leave it out."]
    if schedule not in V_SCHEDULES + LOOPED_SCHEDULES:
        return [
            f"{name}: layout.pipeline_schedule {schedule} runs 1 stage on each rank; leave it out, or "
            f"choose one of {', '.join(LOOPED_SCHEDULES)}."
        ]
    return []


def _micro_batch_problems(layout: LayoutConfig, micro_batches: int) -> list[str]:
    size, schedule = layout.pipeline_parallel_size, layout.pipeline_schedule
    cure = "change batch.global_batch_size or batch.micro_batch_size, or use layout.pipeline_schedule:"
    if schedule == "1f1b" and micro_batches < size:
        return [
            f"layout.pipeline_parallel_size is {size}: each replica needs at least as many "
            f"micro-batches a step as stages, and has {micro_batches}; {cure} gpipe."
        ]
    if schedule == "dualpipev" and micro_batches < 2 * size:
        return [
            f"layout.pipeline_schedule is dualpipev: each replica needs at least as many micro-batches a "
            f"step as stages ({2 * size}), and has {micro_batches}; {cure} zbv."
        ]
    rounds = max(1, micro_batches // size)
    if schedule in ("interleaved_1f1b", "interleaved_zero_bubble") and micro_batches % rounds:
        return [
            f"layout.pipeline_schedule is {schedule}: the {micro_batches} micro-batches of each replica "
            f"must divide into {rounds} equal rounds (a multiple of layout.pipeline_parallel_size "
            f"({size}) always does); {cure} looped_bfs."
        ]
    return []


def _split_problems(layout: LayoutConfig, training: TrainingConfig) -> list[str]:
    schedule = layout.pipeline_schedule
    if schedule not in SPLIT_SCHEDULES:
        return []
    apart = (
        f"layout.pipeline_schedule {schedule} computes the gradients of inputs and of weights in two "
        "passes over one graph"
    )
    problems = []
    if _recomputes_weights(training):
        problems.append(
            f"training.activation_recomputation is {training.activation_recomputation}: {apart}, and would "
            "compute a layer again for each of its weights; set it to selective or none, or use "
            "layout.pipeline_schedule: interleaved_1f1b."
        )
    if training.compile:
        problems.append(
            f"training.compile is true: {apart}, and torch.compile makes one node of each layer that "
            "cannot be passed in part; leave it off, or use layout.pipeline_schedule: interleaved_1f1b."
        )
    return problems


def _recomputes_weights(training: TrainingConfig) -> bool:
    """Whether more is computed again than attention's own product, which has no weights."""
    what = training.activation_recomputation
    if what == "operators":
        return set(training.recomputed_operators) != {"attention"}
    return what in ("budget", "full")
