"""One step of a layout beside one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tests.parallel import workers
from tests.ranks import RankPool

GPT = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=16,
    activation_function="gelu",
    init_method_std=0.2,
)
LLAMA = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=36,
    position_embedding="rotary",
    normalization="rmsnorm",
    activation_function="swiglu",
    attention_bias=False,
    mlp_bias=False,
    qk_normalization=True,
    init_method_std=0.2,
)
FAMILIES = {"gpt": GPT, "llama": LLAMA}
BOUND = 1e-5  # float32: largest gradient difference over the largest gradient


@dataclass(frozen=True)
class Case:
    """One comparison."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    family: str = "gpt"
    tied: bool = True
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    documents: bool = False
    precision: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)
    micro_batches: int | None = None

    @property
    def size(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def name(self) -> str:
        parts = [self.family, "tied" if self.tied else "untied", *layout_name(self)]
        changed = {**self.model, **self.layout, **self.precision, **self.switches}
        parts += [f"{key}={value}" for key, value in changed.items()]
        parts += [f"micro_batches={self.micro_batches}"] if self.micro_batches else []
        return " ".join(parts + ["documents"] * self.documents)


def layout_name(case: Case) -> list[str]:
    sizes = {"tp": case.tensor, "pp": case.pipeline, "dp": case.data, "cp": case.context, "ep": case.expert}
    return ["x".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1"]


def layout_fields(
    tensor: int, pipeline: int, data: int, context: int = 1, expert: int = 1
) -> dict[str, Any]:
    return dict(
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        context_parallel_size=context,
        expert_parallel_size=expert,
    )


@dataclass(frozen=True)
class Difference:
    """Relative differences of a layout from one process."""

    gradient: float
    loss: float
    norm: float
    weights_equal: bool
    tied_copies_equal: bool


def compare(
    pool: RankPool, case: Case, references: dict[str, Any] | None = None, timeout: float = 180.0
) -> Difference:
    """Run ``case`` and one process on the same step."""
    model = {**FAMILIES[case.family], "tie_word_embeddings": case.tied, **case.model}
    sizes = layout_fields(case.tensor, case.pipeline, case.data, case.context, case.expert)
    layout = {**sizes, **case.layout}
    data = dict(
        rows=2,
        sequence=8,
        documents=case.documents,
        micro_batches=case.micro_batches or max(2, case.pipeline),
        replicas=max(2, case.data),
    )
    references = {} if references is None else references
    key = repr((sorted(model.items()), data, case.precision))
    if key not in references:
        single = layout_fields(1, 1, 1)
        references[key] = pool.run(1, workers.one_step, model, single, data, case.precision, {})[0]
    one = references[key]
    args = (model, layout, data, case.precision, case.switches)
    many = pool.run(case.size, workers.one_step, *args, timeout=timeout)
    return _difference(one, many)


def _difference(one: dict[str, Any], many: list[dict[str, Any]]) -> Difference:
    largest = max(np.abs(gradient).max() for gradient in one["gradients"].values())
    worst, equal_weights, copies_equal = 0.0, True, True
    found: dict[str, Any] = {}
    for rank in many:
        for name, gradient in rank["gradients"].items():
            worst = max(worst, float(np.abs(gradient - one["gradients"][name]).max() / largest))
            copies_equal &= np.array_equal(found.setdefault(name, gradient), gradient)
        for name, weight in rank["weights"].items():
            equal_weights &= np.array_equal(weight, one["weights"][name])
    assert set(found) == set(one["gradients"]), "a layer was dropped or invented"
    assert all(rank["counted"] == one["valid"] for rank in many)
    return Difference(
        gradient=worst,
        loss=max(
            abs(rank[key] - one["loss"]) / abs(one["loss"])
            for rank in many
            for key in ("loss", "evaluated")
        ),
        norm=max(abs(rank["norm"] - one["norm"]) / one["norm"] for rank in many),
        weights_equal=equal_weights,
        tied_copies_equal=copies_equal,
    )
