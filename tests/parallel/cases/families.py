"""What other families of decoders have: windows, ALiBi, soft caps, norms elsewhere, gated experts."""

from __future__ import annotations

from typing import Any

from tests.parallel.parity import SEVEN, Case

GEMMA: dict[str, Any] = dict(
    normalization="rmsnorm_1p",
    norm_placement="around",
    activation_function="geglu_tanh",
    embedding_scale=3.0,
    logit_softcap=4.0,
    attention_softcap=2.0,
    attention_scalar=5.0,
    sliding_window=3,
    full_attention_layers=[1, 3],
    rotary_local_base=100.0,
)
BLOOM: dict[str, Any] = dict(position_embedding="alibi", embedding_norm=True)
OPT: dict[str, Any] = dict(norm_placement="after", embedding_size=10, position_offset=2)
NEOX: dict[str, Any] = dict(position_embedding="rotary", rotary_percent=0.5, parallel_residual=True)
DYNAMIC = dict(rope_type="dynamic", factor=2.0)
SCALED: dict[str, Any] = dict(rotary_scaling=DYNAMIC, max_position_embeddings=6)
GATE: dict[str, Any] = dict(shared_expert_gate=True, shared_expert_intermediate_size=10)
WHOLE_STREAM = {"sequence_parallel": False}

SLICE = [
    Case(tensor=2, family="llama", model=GEMMA, documents=True),
    Case(tensor=2, model=BLOOM, layout=WHOLE_STREAM, tied=False),
    Case(tensor=2, pipeline=2, model=OPT),
    Case(tensor=2, model=NEOX, switches={"activation_recomputation": "selective"}),
    Case(tensor=2, family="moe", model=GATE),
]

CASES = [
    *(
        Case(*sizes, family=family, model=model, tied=tied)
        for sizes in SEVEN
        for family, model in (("llama", GEMMA), ("gpt", BLOOM), ("gpt", OPT), ("gpt", NEOX), ("moe", GATE))
        for tied in (True, False)
    ),
    *(
        Case(tensor=2, family=family, model=model, layout=WHOLE_STREAM)
        for family, model in (("llama", GEMMA), ("gpt", OPT), ("gpt", NEOX), ("moe", GATE))
    ),
    *(
        Case(tensor=2, family="llama", model=GEMMA, switches={"activation_recomputation": what})
        for what in ("selective", "full")
    ),
    Case(tensor=2, family="llama", model={**GEMMA, "parallel_output": False}),
    Case(tensor=2, family="llama", model=SCALED),
    Case(tensor=2, data=2, family="llama", model=GEMMA, layout={"data_parallel_sharding": "zero3"}),
]
