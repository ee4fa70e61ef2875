"""The seven ways of dividing over two in three directions, with every family and kind of embedding."""

from __future__ import annotations

from tests.parallel.parity import FAMILIES, SEVEN, Case

SLICE = [
    Case(tensor=2),
    Case(tensor=2, tied=False, layout={"sequence_parallel": False}, model={"parallel_output": False}),
    Case(tensor=2, family="llama", documents=True, switches={"activation_recomputation": "selective"}),
    Case(tensor=2, family="llama", tied=False, layout={"sequence_parallel": False}),
    Case(pipeline=2, documents=True),
    Case(pipeline=2, family="llama", tied=False, layout={"pipeline_schedule": "gpipe"}),
    Case(data=2, documents=True, switches={"activation_recomputation": "full"}),
    Case(data=2, family="llama", tied=False, layout={"data_parallel_sharding": "ddp"}),
    Case(tensor=2, pipeline=2, family="llama", documents=True),
    Case(tensor=2, pipeline=2, tied=False),
    Case(tensor=2, data=2, tied=False, layout={"data_parallel_sharding": "zero3"}),
    Case(tensor=2, data=2, family="llama", layout={"data_parallel_sharding": "ddp"}),
    Case(pipeline=2, data=2),
    Case(pipeline=2, micro_batches=1),  # fewer than stages, as in a batch-size ramp
    Case(pipeline=2, data=2, family="llama", tied=False, switches={"activation_recomputation": "full"}),
    Case(tensor=2, pipeline=2, data=2, documents=True),
    Case(tensor=2, pipeline=2, data=2, family="llama", tied=False),
]

CASES = [
    *(
        Case(*sizes, family=family, tied=tied)
        for sizes in SEVEN
        for family in FAMILIES
        for tied in (True, False)
    ),
    *(Case(*sizes, family="llama", documents=True) for sizes in SEVEN),
    *(Case(*sizes, switches={"activation_recomputation": "full"}) for sizes in SEVEN),
    *(Case(*sizes, precision={"dtype": "bf16"}) for sizes in SEVEN),
    Case(pipeline=3, family="llama"),
    Case(tensor=2, pipeline=3, model={"num_hidden_layers": 7}),
    Case(tensor=4, data=2, model={"vocab_size": 10}),  # 3, 3, 3 and 1 entries
    Case(tensor=2, data=4, family="llama", tied=False),
]
for _data in (1, 2):
    CASES += [
        Case(2, 1, _data, layout={"sequence_parallel": False}),
        Case(2, 2, _data, "llama", tied=False, layout={"sequence_parallel": False}, documents=True),
        Case(2, 1, _data, model={"parallel_output": False}),
        Case(2, 2, _data, "llama", switches={"activation_recomputation": "selective"}),
        Case(1, 2, _data, layout={"pipeline_schedule": "gpipe"}),
    ]

COMPILED = [Case(*sizes, family="llama", switches={"compile": True}) for sizes in ((1, 1, 1), *SEVEN)]
