"""Context parallelism: both kinds of attention, with documents, beside every other kind of layout."""

from __future__ import annotations

from tests.parallel.parity import Case

ALL_TO_ALL = {"context_parallel_method": "all_to_all"}
METHODS = ({}, ALL_TO_ALL)
BF16 = {
    "dtype": "bf16"
}  # 8 bits, and three steps of AdamW on top: weights differ by up to a tenth of a step
DENSE = ("gpt", "llama")
MANY_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}

SLICE = [
    Case(context=2, documents=True),
    Case(context=2, family="llama", tied=False, layout=ALL_TO_ALL, documents=True),
    Case(context=4, family="llama", documents=True),
    Case(context=4, model=MANY_HEADS, layout=ALL_TO_ALL, documents=True),
    Case(tensor=2, context=2, family="llama", documents=True),
    Case(pipeline=2, context=2, documents=True, switches={"activation_recomputation": "full"}),
    Case(data=2, context=2, family="llama", layout={"data_parallel_sharding": "zero3"}, documents=True),
    Case(data=2, context=2, layout={"data_parallel_sharding": "ddp", **ALL_TO_ALL}),
    Case(tensor=2, pipeline=2, context=2, family="llama", documents=True),
]

CASES = [
    *(
        Case(context=size, family=family, tied=tied, layout=method, documents=documents, sequence=16)
        for size in (2, 4)
        for family in DENSE
        for tied in (True, False)
        for method in METHODS
        for documents in (True, False)
    ),
    *(
        Case(context=8, model={**MANY_HEADS, "position_embedding": position}, layout=method, sequence=16)
        for position in ("learned", "rotary")
        for method in METHODS
    ),
    *(
        Case(*sizes, "llama", context=2, layout=method, documents=True)
        for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4))
        for method in METHODS
    ),
    *(
        Case(data=2, context=2, layout={"data_parallel_sharding": sharding}, documents=True)
        for sharding in ("zero1", "zero2", "zero3", "ddp")
    ),
    *(
        Case(context=2, layout={"data_parallel_sharding": sharding, **method}, documents=True)
        for sharding in ("zero1", "ddp", "zero3")
        for method in METHODS
    ),
    Case(
        data=4,
        context=2,
        layout={"data_parallel_sharding": "hybrid", "data_parallel_shard_size": 2},
        documents=True,
    ),
    *(
        Case(tensor=2, context=2, layout={"sequence_parallel": False, **method}, documents=True)
        for method in METHODS
    ),
    Case(context=4, family="llama", model={"num_key_value_heads": 1}, layout=ALL_TO_ALL, documents=True),
    *(
        Case(context=2, family="llama", switches={"activation_recomputation": what}, documents=True)
        for what in ("selective", "full")
    ),
    *(
        Case(context=2, pipeline=2, switches={"activation_recomputation": "selective"}, layout=method)
        for method in METHODS
    ),
    *(
        Case(context=2, family=family, layout=method, precision=BF16, documents=True, bound=0.1)
        for family in DENSE
        for method in METHODS
    ),
    Case(tensor=2, context=2, data=2, precision=BF16, documents=True, bound=0.1),
    Case(context=2, pipeline=2, micro_batches=4, documents=True),
    *(
        Case(
            context=2,
            pipeline=2,
            model={"num_hidden_layers": 6},
            layout={"pipeline_schedule": schedule, **method},
            documents=True,
        )
        for schedule in ("interleaved_1f1b", "zbv", "dualpipev", "interleaved_zero_bubble")
        for method in METHODS
    ),
    *(
        Case(context=2, family="llama", switches=switches, layout=method, documents=True)
        for switches in (
            {"activation_recomputation": "budget", "activation_memory_budget": 0.3},
            {"activation_recomputation": "operators", "recomputed_operators": ["attention", "linear"]},
        )
        for method in METHODS
    ),
]

COMPILED = [
    Case(context=2, family="llama", layout=method, switches={"compile": True}, documents=True)
    for method in METHODS
]
