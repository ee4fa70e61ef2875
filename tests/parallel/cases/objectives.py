"""Encoder-decoders, divided over encoder and decoder, and decoders that read a prefix at once."""

from __future__ import annotations

from tests.parallel.parity import SEVEN, Case

WHOLE_STREAM = {"sequence_parallel": False}
OWN_POSITIONS = {"relative_attention_per_layer": True}

SLICE = [
    Case(tensor=2, family="t5"),
    Case(tensor=2, family="t5", tied=False, layout=WHOLE_STREAM, model={"parallel_output": False}),
    Case(pipeline=2, family="t5"),
    Case(pipeline=2, family="t5", tied=False, model=OWN_POSITIONS, layout={"pipeline_schedule": "gpipe"}),
    Case(data=2, family="t5", layout={"data_parallel_sharding": "zero3"}),
    Case(tensor=2, pipeline=2, family="t5", switches={"activation_recomputation": "full"}),
    Case(pipeline=2, data=2, family="t5", tied=False, layout={"data_parallel_sharding": "zero2"}),
    Case(tensor=2, pipeline=2, prefixes=True),
]

CASES = [
    *(Case(*sizes, family="t5", tied=tied) for sizes in SEVEN for tied in (True, False)),
    *(Case(*sizes, family="t5", model=OWN_POSITIONS) for sizes in SEVEN),
    *(Case(*sizes, family="t5", layout=WHOLE_STREAM) for sizes in SEVEN if sizes[0] > 1),
    *(
        Case(data=2, family="t5", layout={"data_parallel_sharding": sharding})
        for sharding in ("ddp", "zero2", "zero3")
    ),
    *(
        Case(pipeline=2, data=2, family="t5", layout={"data_parallel_sharding": sharding})
        for sharding in ("ddp", "zero3")
    ),
    *(
        Case(pipeline=2, family="t5", layout={"pipeline_schedule": schedule}, micro_batches=4)
        for schedule in ("interleaved_1f1b", "looped_bfs")
    ),
    *(
        Case(2, 2, 1, family="t5", switches={"activation_recomputation": what})
        for what in ("selective", "operators", "budget")
    ),
    Case(pipeline=4, family="t5", model={"num_hidden_layers": 4, "num_decoder_layers": 4}),
    Case(tensor=2, pipeline=2, data=2, family="t5", layout={"data_parallel_sharding": "zero3"}),
    *(Case(*sizes, family="t5", precision={"dtype": "bf16"}) for sizes in SEVEN),
    *(Case(*sizes, prefixes=True) for sizes in SEVEN),
    *(Case(*sizes, family="llama", prefixes=True) for sizes in SEVEN),
]

COMPILED = [Case(*sizes, family="t5", switches={"compile": True}) for sizes in ((1, 1, 1), *SEVEN)]
