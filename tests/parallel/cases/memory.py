"""Activation recomputation: the gradients of a run that keeps everything, in every layout."""

from __future__ import annotations

from typing import Any

from tests.parallel.parity import Case

SELECTIVE = {"activation_recomputation": "selective"}
FULL = {"activation_recomputation": "full"}


def operators(*names: str) -> dict[str, Any]:
    """Recompute these operators."""
    return {"activation_recomputation": "operators", "recomputed_operators": list(names)}


def budget(share: float) -> dict[str, Any]:
    """Keep this share of the activations."""
    return {"activation_recomputation": "budget", "activation_memory_budget": share}


NORMS = operators("normalization", "activation")
ALL = operators("attention", "normalization", "activation", "linear")

SLICE = [
    Case(tensor=2, switches=NORMS),
    Case(tensor=2, family="llama", documents=True, switches=ALL),
    Case(tensor=2, pipeline=2, switches=budget(0.4)),
    Case(data=2, family="llama", layout={"data_parallel_sharding": "zero3"}, switches=ALL),
]
CASES = [
    *(
        Case(tensor, pipeline, data, family, switches=switches)
        for tensor, pipeline, data in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2))
        for family in ("gpt", "llama")
        for switches in (SELECTIVE, FULL, NORMS, ALL, budget(0.3), budget(0.0))
    ),
    *(
        Case(family=family, switches=operators(name))
        for family in ("gpt", "llama")
        for name in ALL["recomputed_operators"]
    ),
    *(Case(tensor=2, layout={"sequence_parallel": False}, switches=switches) for switches in (NORMS, ALL)),
    *(Case(context=2, tensor=2, switches=switches) for switches in (SELECTIVE, FULL, ALL, budget(0.4))),
    *(
        Case(
            pipeline=2,
            layout={"pipeline_schedule": schedule},
            model={"num_hidden_layers": 4},
            switches=switches,
        )
        for schedule in ("interleaved_1f1b", "zbv", "dualpipev", "interleaved_zero_bubble")
        for switches in (SELECTIVE, FULL, ALL, budget(0.4))
    ),
    *(
        Case(data=2, layout={"data_parallel_sharding": name}, switches=ALL)
        for name in ("ddp", "zero2", "hybrid")
    ),
    *(
        Case(data=2, expert=2, family="moe", tied=False, switches=switches)
        for switches in (FULL, ALL, budget(0.4))
    ),
    *(
        Case(2, 2, 2, switches=switches, precision={"dtype": "bf16"})
        for switches in (FULL, ALL, budget(0.4))
    ),
]
