"""A layout beside one process: the same loss, gradients and weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tests.parallel import parity_worker
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
MOE = LLAMA | dict(
    num_hidden_layers=4,
    moe_intermediate_size=12,
    num_experts=4,
    num_shared_experts=1,
    num_dense_layers_first=1,
    router_aux_loss_coefficient=0.05,
    router_z_loss_coefficient=0.01,
)
T5 = dict(
    architecture="encoder_decoder",
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=3,
    num_decoder_layers=2,
    num_attention_heads=4,
    head_dim=5,
    intermediate_size=36,
    position_embedding="relative",
    relative_attention_num_buckets=6,
    relative_attention_max_distance=7,
    normalization="rmsnorm",
    activation_function="geglu_tanh",
    attention_bias=False,
    mlp_bias=False,
    init_method_std=0.2,
)
FAMILIES = {"gpt": GPT, "llama": LLAMA, "moe": MOE, "t5": T5}
SEVEN = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]  # tp, pp, dp
BOUND = 1e-5  # float32: largest gradient difference over the largest gradient
# Beside one process in float32. bf16 keeps 8 bits of a number and fp16 11.
BOUNDS = {"float32": BOUND, "bf16": 0.05, "fp16": 0.01}


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        tensor, pipeline, data, context, expert: sizes of the layout.
        family: of :data:`FAMILIES`.
        tied: whether the head is the embedding.
        model: fields of the model to change.
        layout: fields of the layout besides its sizes.
        documents: whether samples have document boundaries.
        prefixes: whether a decoder reads a part of each sample at once.
        target: tokens that an encoder-decoder writes.
        precision, switches: fields of ``PrecisionConfig`` and ``TrainingConfig``.
        micro_batches: of each replica; ``None`` is one for each stage, at least 2.
        rows: sequences of a micro-batch.
        sequence: tokens of a sequence.
        bound: of every relative difference in a step; ``None`` is that of the precision.
        adapter: fields of an ``AdapterConfig``; empty trains the model's own weights.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    family: str = "gpt"
    tied: bool = True
    context: int = 1
    expert: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    documents: bool = False
    prefixes: bool = False
    target: int = 6
    precision: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)
    micro_batches: int | None = None
    rows: int = 2
    sequence: int = 8
    bound: float | None = None
    adapter: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def name(self) -> str:
        """What is special about it; no two cases of one name differ."""
        parts = [self.family, "tied" if self.tied else "untied", self.layout_name]
        changed = {**self.model, **self.layout, **self.precision, **self.switches, **self.adapter}
        parts += [f"{key}={value}" for key, value in changed.items()]
        usual = {"micro_batches": None, "rows": 2, "sequence": 8, "target": 6}
        parts += [
            f"{key}={getattr(self, key)}" for key, value in usual.items() if getattr(self, key) != value
        ]
        return " ".join(parts + ["documents"] * self.documents + ["prefixes"] * self.prefixes)

    @property
    def layout_name(self) -> str:
        """``tp2xpp2``; ``1`` is one process."""
        sizes = {"tp": self.tensor, "pp": self.pipeline, "dp": self.data}
        sizes |= {"cp": self.context, "ep": self.expert}
        return "x".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1"

    @property
    def allowed(self) -> float:
        """The bound of every relative difference of one step; weights have taken several."""
        return self.bound or BOUNDS[self.precision.get("dtype", "float32")]


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
    """Relative differences of a layout from one process.

    Args:
        gradient: largest difference of a gradient, over the largest gradient of the model.
        loss: of the summed loss in training and in evaluation.
        norm: of the gradient norm.
        weights_equal: whether the first weights are the same bits.
        after: largest difference of a weight after three steps, over the largest change of a weight.
        copies_equal: whether ranks that hold the same weight (a tied embedding's two stages) agree in
            its gradient and in its value after three steps to the bit.
    """

    gradient: float
    loss: float
    norm: float
    weights_equal: bool
    after: float
    copies_equal: bool

    def problems(self, case: Case) -> list[str]:
        """What is not within the case's bound."""
        found = [
            f"{name} {getattr(self, name):.1e}"
            for name in ("gradient", "loss", "norm", "after")
            if not getattr(self, name) <= case.allowed * (parity_worker.STEPS if name == "after" else 1)
        ]
        found += ["first weights differ"] * (not self.weights_equal)
        return found + ["copies differ"] * (not self.copies_equal)


def compare(
    pool: RankPool, case: Case, references: dict[str, Any] | None = None, timeout: float = 180.0
) -> Difference:
    """Run ``case``, and one process in float32 without any switch, on the same steps.

    Args:
        pool: of ranks.
        case: what to compare.
        references: remembers what one process gave, for cases that share it.
        timeout: seconds for the ranks.
    """
    model = {**FAMILIES[case.family], "tie_word_embeddings": case.tied, **case.model}
    sizes = layout_fields(case.tensor, case.pipeline, case.data, case.context, case.expert)
    layout = {**sizes, **case.layout}
    data = dict(
        rows=case.rows,
        sequence=case.sequence,
        documents=case.documents,
        micro_batches=case.micro_batches or max(2, case.pipeline),
        replicas=max(2, case.data),
        prefixes=case.prefixes,
        target=case.target * (case.family == "t5"),
    )
    references = {} if references is None else references
    key = repr((sorted(model.items()), data, case.adapter))
    if key not in references:
        one = (model, layout_fields(1, 1, 1), data, {}, {}, case.adapter)
        references[key] = pool.run(1, parity_worker.run_case, *one)[0]
    args = (model, layout, data, case.precision, case.switches, case.adapter)
    return _difference(references[key], pool.run(case.size, parity_worker.run_case, *args, timeout=timeout))


def _difference(one: dict[str, Any], ranks: list[dict[str, Any]]) -> Difference:
    for kind in ("gradients", "weights", "weights_after"):
        names = set().union(*(rank[kind] for rank in ranks))
        assert names == set(one[kind]), "a layer was dropped or invented"
    assert all(rank["counted"] == one["valid"] for rank in ranks), "tokens were dropped or counted twice"
    largest = max(np.abs(gradient).max() for gradient in one["gradients"].values())
    change = max(np.abs(one["weights_after"][name] - first).max() for name, first in one["weights"].items())
    return Difference(
        gradient=_farthest(one, ranks, "gradients") / largest,
        loss=max(
            abs(rank[key] - one[key]) / abs(one[key]) for rank in ranks for key in ("loss", "evaluated")
        ),
        norm=max(abs(rank["norm"] - one["norm"]) / one["norm"] for rank in ranks),
        weights_equal=_farthest(one, ranks, "weights") == 0.0,
        after=_farthest(one, ranks, "weights_after") / change,
        copies_equal=all(_copies_equal(ranks, kind) for kind in ("gradients", "weights_after")),
    )


def _farthest(one: dict[str, Any], ranks: list[dict[str, Any]], kind: str) -> float:
    pairs = [(rank[kind][name], one[kind][name]) for rank in ranks for name in rank[kind]]
    return max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs)


def _copies_equal(ranks: list[dict[str, Any]], kind: str) -> bool:
    first: dict[str, Any] = {}
    pairs = [(first.setdefault(name, mine), mine) for rank in ranks for name, mine in rank[kind].items()]
    return all(np.array_equal(one, other) for one, other in pairs)
