"""Which layers each pipeline stage runs."""

from __future__ import annotations

from mtnlg.config.model import MegatronModelConfig


def layers_of_stages(model: MegatronModelConfig, num_stages: int) -> list[range]:
    """Which layers each pipeline stage runs: contiguous, in order, work as even as whole layers allow.

    Work is counted in parameters, to which multiplications and memory are proportional. The embedding
    counts as work of the first stage (``pre_process_first``), the head of the last
    (``post_process_last``). Of the divisions with the lightest heaviest stage, the one that gives
    earlier stages less is taken: they hold more micro-batches in flight.

    Args:
        model: the architecture.
        num_stages: pipeline stages, at most as many as layers.
    """
    layer = model.num_parameters_per_layer
    end = model.vocab_size * model.hidden_size / layer  # in layers
    first, last = end * model.pre_process_first, end * model.post_process_last
    counts = _divide_layers(model.num_hidden_layers, num_stages, first, last)
    starts = [sum(counts[:stage]) for stage in range(num_stages)]
    return [range(start, start + count) for start, count in zip(starts, counts)]


def _divide_layers(layers: int, stages: int, first: float, last: float) -> list[int]:
    """Layers of each stage; ``first`` and ``last`` are the ends' extra work, in layers."""
    extra = [0.0] * stages
    extra[0] += first
    extra[-1] += last
    counts = [1] * stages  # every stage runs at least one layer
    for _ in range(layers - stages):
        lightest = min(range(stages), key=lambda stage: (counts[stage] + extra[stage], -stage))
        counts[lightest] += 1
    return counts
