"""Which layers each pipeline stage runs: as the user says, or balanced by cost."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from mtnlg.config.layout import LayoutConfig
from mtnlg.config.model import MegatronModelConfig
from mtnlg.config.pipeline_notation import LAYER, notation_problem, parse_stages


def layers_of_stages(model: MegatronModelConfig, layout: LayoutConfig) -> list[range]:
    """Which layers each pipeline stage runs: contiguous, in order, every layer once.

    ``layout.pipeline_layout`` says it, or costs are balanced: see :func:`divide_by_cost`. A stage may
    have no layers if it is the first, which embeds, or the last, which computes the loss.

    Args:
        model: the architecture.
        layout: a layout that fits it (see :func:`division_problems`).
    """
    counts = stated_counts(layout)
    if counts is None:
        costs = [cost_of_layer(model, index) for index in range(model.total_layers)]
        counts = divide_by_cost(costs, layout.num_stages, *costs_of_ends(model))
    assert len(counts) == layout.num_stages and sum(counts) == model.total_layers, counts
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts)]


def stated_counts(layout: LayoutConfig) -> list[int] | None:
    """Layers of each stage as ``layout.pipeline_layout`` says; ``None`` where it leaves them open, or
    where it has been refused for itself and other problems are looked for."""
    stated = layout.pipeline_layout
    if isinstance(stated, str):
        return None if notation_problem(stated) else [stage.count(LAYER) for stage in parse_stages(stated)]
    return None if stated is None else list(stated)


def cost_of_layer(model: MegatronModelConfig, index: int) -> float:
    """Work of one layer: the parameters that one token meets, to which its multiplications are
    proportional. Of a layer's experts only those that a token is sent to count."""
    return float(model.num_active_parameters_of_layer(index))


def costs_of_ends(model: MegatronModelConfig) -> tuple[float, float]:
    """Work of the embedding and of the head with its loss, where the model's config counts them."""
    matrix = float(model.vocab_size * model.hidden_size)
    return matrix * model.pre_process_first, matrix * model.post_process_last


def divide_by_cost(
    costs: Sequence[float], num_stages: int, first: float = 0.0, last: float = 0.0
) -> list[int]:
    """Layers of each stage, such that the heaviest stage is as light as it can be.

    Of all such divisions the most even one is taken (the smallest sum of squares), and of those the
    one that gives earlier stages fewer layers: they hold more micro-batches in flight.

    Args:
        costs: work of each layer, computed or measured, in any unit.
        num_stages: stages, each of which gets at least one layer.
        first: work of the first stage besides its layers (the embedding).
        last: work of the last stage besides its layers (the head and the loss).
    """
    return _Division(costs, num_stages, first, last).counts()


class _Division:
    """Costs of all contiguous runs of layers, by sums from the left."""

    def __init__(self, costs: Sequence[float], num_stages: int, first: float, last: float) -> None:
        self.num_layers, self.num_stages = len(costs), num_stages
        self.sums = list(accumulate(costs, initial=0.0))
        self.first, self.last = first, last

    def cost(self, stage: int, start: int, end: int) -> float:
        """Work of ``stage`` if it runs the layers [start, end)."""
        ends = self.first * (stage == 0) + self.last * (stage == self.num_stages - 1)
        return self.sums[end] - self.sums[start] + ends

    def counts(self) -> list[int]:
        """Layers of each stage."""
        limit = self.lightest_heaviest()
        # best[end]: the least sum of squares of the stages so far over the layers before ``end``, and
        # where the last of these stages starts.
        best: dict[int, float] = {0: 0.0}
        starts: list[dict[int, int]] = []
        for stage in range(self.num_stages):
            reached: dict[int, float] = {}
            start_of: dict[int, int] = {}
            for start in sorted(best):
                for end in self._ends(stage, start, limit):
                    total = best[start] + self.cost(stage, start, end) ** 2
                    # Starts come in ascending order: what is kept of equals gives earlier stages less.
                    if total < reached.get(end, float("inf")) * (1.0 - 1e-12):
                        reached[end], start_of[end] = total, start
            best = reached
            starts.append(start_of)
        end, counts = self.num_layers, []
        for start_of in reversed(starts):
            counts.append(end - start_of[end])
            end = start_of[end]
        return counts[::-1]

    def lightest_heaviest(self) -> float:
        """Work of the heaviest stage of the best division."""
        last_stage = self.num_stages - 1
        sizes = sorted(
            {
                self.cost(stage, start, end)
                for start in range(self.num_layers)
                for end in range(start + 1, self.num_layers + 1)
                for stage in ({0} if start == 0 else {last_stage} if end == self.num_layers else {1})
            }
        )
        return sizes[bisect_left(sizes, True, key=self._fits)]

    def _fits(self, limit: float) -> bool:
        """Whether no stage needs more work than ``limit``: each takes what it can and leaves the rest."""
        end = 0
        for stage in range(self.num_stages):
            ends = self._ends(stage, end, limit)
            if not ends:
                return False
            end = ends[-1]
        return True

    def _ends(self, stage: int, start: int, limit: float) -> list[int]:
        """Where a stage that starts at ``start`` may end, leaving each later stage a layer."""
        limit *= 1.0 + 1e-9
        if stage == self.num_stages - 1:
            fits = start < self.num_layers and self.cost(stage, start, self.num_layers) <= limit
            return [self.num_layers] if fits else []
        ends = []
        for end in range(start + 1, self.num_layers - (self.num_stages - 1 - stage) + 1):
            if self.cost(stage, start, end) > limit:
                break
            ends.append(end)
        return ends


def division_problems(model: MegatronModelConfig, layout: LayoutConfig) -> list[str]:
    """Why the layers cannot be divided as ``layout`` asks; empty when they can."""
    stages, layers = layout.num_stages, model.total_layers
    counted = (
        "model.num_hidden_layers + num_decoder_layers" if model.has_encoder else "model.num_hidden_layers"
    )
    counts = stated_counts(layout)
    if counts is None:
        if stages <= layers:
            return []
        return [
            f"layout.pipeline_parallel_size is {layout.pipeline_parallel_size}: {_total(layout)} are more "
            f"stages than {counted} ({layers}). Use fewer, or say in layout.pipeline_layout "
            "which stages have no layers ('E|t|t|L': only the first and the last may)."
        ]
    name = f"layout.pipeline_layout is {layout.pipeline_layout!r}"
    problems = []
    if len(counts) != stages:
        problems.append(f"{name}: it describes {len(counts)} stages and the layout has {_total(layout)}.")
    if sum(counts) != layers:
        problems.append(f"{name}: it has {sum(counts)} layers and the model {layers} ({counted}).")
    empty = [str(stage) for stage, count in enumerate(counts) if count == 0]
    idle = [stage for stage in empty if stage not in ("0", str(len(counts) - 1))]
    if len(counts) == 1:
        idle = empty
    if idle:
        problems.append(
            f"{name}: stage {', '.join(idle)} (counted from 0) would have nothing to do; only the first "
            "stage, which embeds, and the last, which computes the loss, may have no layers."
        )
    return problems


def _total(layout: LayoutConfig) -> str:
    """The number of stages and where it comes from."""
    return (
        f"{layout.num_stages} (pipeline_parallel_size {layout.pipeline_parallel_size} x "
        f"{layout.num_chunks} for each rank)"
    )
