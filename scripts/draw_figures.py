"""Draw the figures of docs/parallelism.md: ``python scripts/draw_figures.py [--out docs/images]``.

Pipelines are drawn from torch's own schedules, ranks and chunks of sequences from this package's code.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch.distributed.pipelining import schedules as torch_schedules

from mtnlg.config import LayoutConfig, MegatronModelConfig, PrecisionConfig, TrainingConfig
from mtnlg.config.layout import PIPELINE_SCHEDULES
from mtnlg.parallel.mesh import AXES
from mtnlg.parallel.ring_attention import chunks_of_rank
from mtnlg.planning import memory_of_rank

OUT = Path(__file__).resolve().parents[1] / "docs" / "images"
TORCH_SCHEDULES = {
    "interleaved_1f1b": torch_schedules.ScheduleInterleaved1F1B,
    "looped_bfs": torch_schedules.ScheduleLoopedBFS,
    "interleaved_zero_bubble": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}
UNITS = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}  # time of one whole rank's layers: forward 1, backward 2
COLORS = {"F": "#8fbcdb", "B": "#8fce9b", "I": "#c6e2a5", "W": "#f0c987"}
MEANING = {"F": "forward", "B": "backward", "I": "backward of inputs", "W": "backward of weights"}


@dataclass(frozen=True)
class Action:
    """One piece of work of a rank: of which kind, stage and micro-batch, and when."""

    kind: str
    stage: int
    micro_batch: int
    start: float
    end: float


def timeline(schedule: str, ranks: int, micro_batches: int) -> list[list[Action]]:
    """What each rank does when, if messages took no time.

    Args:
        schedule: as in ``layout.pipeline_schedule``.
        ranks: of the pipeline.
        micro_batches: of a step.
    """
    layout = LayoutConfig(pipeline_parallel_size=ranks, pipeline_schedule=schedule)
    waiting = [_orders(layout, rank, micro_batches) for rank in range(ranks)]
    done: dict[tuple[str, int, int], float] = {}
    clocks, found = [0.0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    while any(waiting):
        moved = False
        for rank, orders in enumerate(waiting):
            while orders and (ready := _ready(orders[0], done, layout.num_stages)) is not None:
                begin = clocks[rank] = max(clocks[rank], ready)
                for kind, stage, micro_batch in orders.pop(0):
                    clocks[rank] += UNITS[kind] / layout.num_chunks
                    action = Action(kind, stage, micro_batch, begin, clocks[rank])
                    begin = clocks[rank]
                    done[(kind, stage, micro_batch)] = begin
                    found[rank].append(action)
                moved = True
        assert moved, "the schedule waits for itself"
    return found


def idle_share(found: list[list[Action]]) -> float:
    """Share of the whole time that ranks wait."""
    length = max(actions[-1].end for actions in found)
    busy = sum(action.end - action.start for actions in found for action in actions)
    return 1.0 - busy / (length * len(found))


def _orders(layout: LayoutConfig, rank: int, micro_batches: int) -> list[list[tuple[str, int, int]]]:
    """A rank's work in order, each entry what it does in one go (DualPipeV overlaps two)."""
    size, schedule = layout.pipeline_parallel_size, layout.pipeline_schedule
    if schedule not in TORCH_SCHEDULES:  # torch runs these two without a table
        ahead = micro_batches if schedule == "gpipe" else size - 1 - rank
        forward = [("F", rank, batch) for batch in range(micro_batches)]
        backward = [("B", rank, batch) for batch in range(micro_batches)]
        turns = [piece for pair in zip(forward[ahead:], backward) for piece in pair]
        return [[piece] for piece in [*forward[:ahead], *turns, *backward[micro_batches - ahead :]]]
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=number,
            num_stages=layout.num_stages,
            group_size=size,
            group_rank=rank,
            group=None,
            submod=None,
            device=None,
            is_first=number == 0,
            is_last=number == layout.num_stages - 1,
            has_backward=True,
        )
        for number in layout.stages_of_rank(rank)
    ]
    kind: Any = TORCH_SCHEDULES[schedule]
    order = kind(stages, micro_batches).pipeline_order[rank]
    return [pieces for action in order if action is not None and (pieces := _pieces(action))]


def _pieces(action: Any) -> list[tuple[str, int, int]]:
    if action.sub_actions:
        return [piece for part in action.sub_actions for piece in _pieces(part)]
    kind = action.computation_type.value
    return [(kind, action.stage_index, action.microbatch_index)] if kind in UNITS else []


def _ready(pieces: list[tuple[str, int, int]], done: dict[Any, float], num_stages: int) -> float | None:
    """When everything that ``pieces`` wait for is there; ``None`` while it is not known."""
    times = [0.0]
    for kind, stage, batch in pieces:
        if kind == "F" and stage > 0:
            times.append(done.get(("F", stage - 1, batch), -1.0))
        elif kind in "BI":
            times.append(done.get(("F", stage, batch), -1.0))
            if stage < num_stages - 1:
                after = (done.get((name, stage + 1, batch)) for name in "BI")
                times.append(next((time for time in after if time is not None), -1.0))
    return None if min(times) < 0.0 else max(times)


def draw_pipelines() -> Figure:
    """The seven schedules on four ranks with eight micro-batches."""
    ranks, micro_batches = 4, 8
    figure = Figure(figsize=(11, 13), layout="constrained")
    for axes, name in zip(figure.subplots(len(PIPELINE_SCHEDULES), sharex=True), PIPELINE_SCHEDULES):
        found = timeline(name, ranks, micro_batches)
        for rank, actions in enumerate(found):
            for action in actions:
                width = action.end - action.start
                shade = 1.0 if action.stage < ranks else 0.6
                axes.add_patch(
                    Rectangle(
                        (action.start, rank), width, 0.9, color=COLORS[action.kind], alpha=shade, lw=0
                    )
                )
                axes.text(
                    action.start + width / 2,
                    rank + 0.47,
                    str(action.micro_batch),
                    fontsize=6,
                    ha="center",
                    va="center",
                )
        axes.set(xlim=(0, 36), ylim=(ranks, 0), yticks=[r + 0.45 for r in range(ranks)])
        axes.set_yticklabels([f"rank {rank}" for rank in range(ranks)], fontsize=7)
        axes.set_title(f"{name}: {idle_share(found):.0%} idle", fontsize=9, loc="left")
    axes.set_xlabel("time (a rank's forward pass of one micro-batch is 1)", fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[kind]) for kind in COLORS]
    figure.legend(
        handles, [MEANING[kind] for kind in COLORS], loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def draw_ranks() -> Figure:
    """Which rank does what: two stages, two replicas, two parts of the context, two tensor ranks."""
    layout = LayoutConfig(
        tensor_parallel_size=2, pipeline_parallel_size=2, data_parallel_size=2, context_parallel_size=2
    )
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for rank in range(layout.num_ranks):
        rest, tensor = divmod(rank, layout.tensor_parallel_size)
        rest, context = divmod(rest, layout.context_parallel_size)
        stage, replica = divmod(rest, layout.data_parallel_size or 1)
        column = (replica * 2 + context) * 2 + tensor
        color = matplotlib.colormaps["tab20c"](stage * 4 + replica)
        axes.add_patch(Rectangle((column, stage), 0.94, 0.9, color=color, lw=0))
        text = f"rank {rank}\nreplica {replica}\ncontext {context}\ntensor {tensor}"
        axes.text(column + 0.47, stage + 0.45, text, fontsize=8, ha="center", va="center")
    axes.set(xlim=(-0.05, 8), ylim=(2, -0.05), xticks=[], yticks=[0.45, 1.45])
    axes.set_yticklabels(["stage 0", "stage 1"])
    axes.set_title(f"Sixteen ranks over {', '.join(AXES)}, the last fastest", fontsize=9, loc="left")
    return figure


def draw_context() -> Figure:
    """How a causal sequence is cut over four ranks: ring attention's chunks, and one stretch each."""
    ranks = 4
    figure = Figure(figsize=(9, 4), layout="constrained")
    zigzag, stretch = figure.subplots(1, 2)
    owners = {chunk: rank for rank in range(ranks) for chunk in chunks_of_rank(rank, ranks)}
    for axes, owner_of, title in (
        (zigzag, [owners[chunk] for chunk in range(2 * ranks)], "ring: an early and a late chunk each"),
        (stretch, [chunk // 2 for chunk in range(2 * ranks)], "one stretch each, were it cut in order"),
    ):
        work = [0.0] * ranks
        for query, owner in enumerate(owner_of):
            for key in range(query + 1):
                color = matplotlib.colormaps["tab10"](owner)
                axes.add_patch(Rectangle((key, query), 0.95, 0.95, color=color, lw=0))
                work[owner] += 0.5 if key == query else 1.0
        axes.set(xlim=(0, 2 * ranks), ylim=(2 * ranks, 0), aspect="equal")
        axes.set(xlabel="keys (chunks)", ylabel="queries (chunks)")
        shares = ", ".join(f"{amount / sum(work):.0%}" for amount in work)
        axes.set_title(f"{title}\nwork of ranks 0 to 3: {shares}", fontsize=9)
    return figure


def draw_memory() -> Figure:
    """Bytes of a rank under each sharding, GPT-3 1.3B in bf16 over 8 replicas."""
    model = MegatronModelConfig.from_preset("gpt3-1.3b")
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    names = ["ddp", "zero1", "zero2", "zero3"]
    parts = ("weights", "gradients", "optimizer", "activations")
    needs = [
        memory_of_rank(
            LayoutConfig(data_parallel_size=8, data_parallel_sharding=name),
            model,
            2048,
            1,
            4,
            PrecisionConfig(dtype="bf16"),
            TrainingConfig(),
        )
        for name in names
    ]
    left = [0.0] * len(names)
    for part, color in zip(parts, COLORS.values()):
        widths = [getattr(need, part) / 1e9 for need in needs]
        axes.barh(names, widths, left=left, color=color, label=part)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set_xlabel("GB a device (GPT-3 1.3B, bf16, 8 replicas, one sequence of 2,048 tokens)")
    axes.legend(fontsize=8)
    return figure


FIGURES = {
    "pipeline-schedules.png": draw_pipelines,
    "rank-order.svg": draw_ranks,
    "context-chunks.svg": draw_context,
    "zero-memory.svg": draw_memory,
}


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description="Draw the figures of docs/parallelism.md.")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # Names inside of an SVG would be random and dates new each time: the same picture, the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "mtnlg", "svg.fonttype": "none"})
    for name, draw in FIGURES.items():
        draw().savefig(
            options.out / name, dpi=100, metadata={"Software" if name.endswith("png") else "Date": None}
        )
        print(options.out / name)


if __name__ == "__main__":
    main()
