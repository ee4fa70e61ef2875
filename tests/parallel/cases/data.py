"""What replicas hold, alone and with every other way of dividing, in every precision.

Bounds: float32 keeps the usual one. In bf16 and fp16 the comparison is with float32, so the bound is
that of the format, whatever the layout; gradients that travel in bf16 lose as much as those computed in
it.
"""

from __future__ import annotations

from typing import Any

from tests.parallel.parity import BOUNDS, Case

SHARDINGS: list[dict[str, Any]] = [
    {"data_parallel_sharding": name} for name in ("ddp", "zero1", "zero2", "zero3")
]
HYBRID = {"data_parallel_sharding": "hybrid", "data_parallel_shard_size": 2}
ZERO2, ZERO3 = SHARDINGS[2:]
BF16, FP16 = {"dtype": "bf16"}, {"dtype": "fp16", "initial_loss_scale": 1024.0}
OFFLOAD = {"cpu_offload": True}  # on a CPU: the same steps, with masters in memory of their own
SENT_IN_BF16 = {"reduce_dtype": "bf16"}

SLICE = [
    Case(data=2, family="llama", tied=False, layout=ZERO2, micro_batches=3),
    Case(data=2, layout=ZERO3, precision=BF16, micro_batches=3),
    Case(data=4, layout=HYBRID, documents=True),
    Case(pipeline=2, data=2, layout=ZERO2),
    Case(pipeline=2, data=2, family="llama", tied=False, layout=ZERO3, micro_batches=4),
    Case(tensor=2, data=2, precision=BF16),
    Case(data=2, precision={**BF16, **SENT_IN_BF16}, layout=SHARDINGS[0]),
    Case(data=2, precision=SENT_IN_BF16, bound=BOUNDS["bf16"]),
    Case(pipeline=2, precision=FP16),
    Case(tensor=2, data=2, layout={**ZERO3, **OFFLOAD}),
    Case(data=2, layout=OFFLOAD, precision=BF16),
    Case(pipeline=2, tensor=2, precision=BF16),
]

CASES = [
    *(
        Case(*sizes, family=family, layout=sharding, micro_batches=4)
        for sizes in ((1, 1, 2), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 3))
        for sharding in SHARDINGS
        for family in ("gpt", "llama")
    ),
    *(
        Case(*sizes, layout=HYBRID, micro_batches=4, tied=tied)
        for sizes in ((1, 1, 4), (2, 1, 4), (1, 2, 4))
        for tied in (True, False)
    ),
    *(
        Case(*sizes, layout=sharding, precision=precision, micro_batches=4)
        for sizes in ((1, 1, 2), (2, 1, 2), (1, 2, 2))
        for sharding in SHARDINGS
        for precision in (BF16, FP16, {**BF16, **SENT_IN_BF16})
    ),
    *(
        Case(data=4, layout=HYBRID, precision=precision, micro_batches=4)
        for precision in (BF16, FP16, {**BF16, **SENT_IN_BF16})
    ),
    *(
        Case(*sizes, precision=precision)
        for sizes in ((2, 1, 1), (1, 2, 1), (2, 2, 1))
        for precision in (BF16, FP16)
    ),
    *(
        Case(data=2, layout=sharding, precision=SENT_IN_BF16, bound=BOUNDS["bf16"], micro_batches=4)
        for sharding in SHARDINGS
    ),
    *(
        Case(*sizes, layout={**sharding, **OFFLOAD}, precision=precision)
        for sizes in ((1, 1, 2), (2, 1, 2), (1, 2, 2))
        for sharding in SHARDINGS
        for precision in ({}, BF16)
    ),
    *(Case(*sizes, layout=OFFLOAD, precision=BF16) for sizes in ((2, 1, 1), (1, 2, 1), (2, 2, 1))),
    Case(data=4, layout={**HYBRID, **OFFLOAD}),
    *(
        Case(context=2, data=data, layout=sharding, micro_batches=2)
        for data in (1, 2)
        for sharding in SHARDINGS
    ),
    *(
        Case(1, 2, 2, "llama", layout={"pipeline_schedule": schedule, **sharding}, micro_batches=4)
        for schedule in ("gpipe", "interleaved_1f1b", "looped_bfs")
        for sharding in SHARDINGS
    ),
    *(
        # Five layers in bf16 end 7% from float32 in one process too.
        Case(
            *(1, 2, data, "llama"),
            layout={"pipeline_schedule": schedule, **sharding},
            precision=precision,
            bound=0.1 if precision else None,
        )
        for schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")
        for data, sharding in ((1, {}), (2, SHARDINGS[0]), (2, SHARDINGS[1]))
        for precision in ({}, BF16)
    ),
]
