"""Pipeline parallelism: every schedule, several stages on a rank, uneven and empty stages."""

from __future__ import annotations

from typing import Any

from tests.parallel.parity import Case

FOUR = {"num_hidden_layers": 4}
FIVE = {"num_hidden_layers": 5}
SEVERAL = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")
LOOPED = SEVERAL[:3]
SPLIT = SEVERAL[2:]
BF16 = {"dtype": "bf16"}


def schedule(name: str, **layout: Any) -> dict[str, Any]:
    return {"pipeline_schedule": name, **layout}


SLICE = [
    Case(pipeline=2, model=FOUR, layout=schedule("zbv"), micro_batches=3),
    Case(
        pipeline=2,
        family="llama",
        tied=False,
        layout=schedule("interleaved_1f1b", pipeline_layout="E|t*3|t|tL"),
        documents=True,
    ),
    Case(tensor=2, pipeline=2, model=FOUR, layout=schedule("interleaved_zero_bubble"), documents=True),
    Case(pipeline=2, data=2, family="llama", layout=schedule("dualpipev"), micro_batches=4),
    Case(
        pipeline=2,
        data=2,
        model=FOUR,
        layout=schedule("looped_bfs", data_parallel_sharding="zero3"),
        switches={"activation_recomputation": "full"},
    ),
]

CASES = [
    *(  # every schedule in every direction, both families, tied and untied
        Case(
            tensor=tensor,
            pipeline=2,
            data=data,
            family=family,
            tied=tied,
            model=model,
            layout=schedule(name),
            micro_batches=4,
        )
        for name in SEVERAL
        for tensor, data in ((1, 1), (2, 1), (1, 2), (2, 2))
        for family, tied, model in (("gpt", True, FIVE), ("llama", False, {}))
    ),
    *(  # four ranks, and eight stages of eight layers
        Case(pipeline=4, data=data, model={"num_hidden_layers": 8}, layout=schedule(name), micro_batches=8)
        for name in SEVERAL
        for data in (1, 2)
    ),
    *(  # as few and as odd numbers of micro-batches as a batch-size ramp gives
        Case(pipeline=2, model=FOUR, layout=schedule(name), micro_batches=count)
        for name in SEVERAL
        for count in (1, 2, 3, 5)
    ),
    *(  # one stage on each rank, and three
        Case(pipeline=2, model=model, layout=schedule(name, stages_per_rank=stages), micro_batches=4)
        for name in LOOPED
        for stages, model in ((1, FOUR), (3, {"num_hidden_layers": 7}))
    ),
    *(  # stages without layers at both ends
        Case(pipeline=2, tied=tied, layout=schedule(name, pipeline_layout="E|tt|t|L"), micro_batches=4)
        for name in SEVERAL
        for tied in (True, False)
    ),
    Case(pipeline=2, model=FIVE, layout={"pipeline_layout": [4, 1]}),
    Case(pipeline=3, layout={"pipeline_layout": "E|t*3|L"}),
    Case(pipeline=4, data=2, family="llama", layout={"pipeline_layout": [0, 2, 3, 0]}),
    *(  # what replicas hold
        Case(
            pipeline=2,
            data=2,
            family="llama",
            layout=schedule(name, data_parallel_sharding=sharding),
            micro_batches=4,
        )
        for name in SEVERAL
        for sharding in ("ddp", "zero1", "zero2", "zero3")
        if name not in SPLIT or sharding in ("ddp", "zero1")
    ),
    *(  # 16 bits
        Case(pipeline=2, data=data, model=FOUR, layout=schedule(name), precision=BF16, micro_batches=4)
        for name in SEVERAL
        for data in (1, 2)
    ),
    *(  # recomputation
        Case(
            tensor=tensor,
            pipeline=2,
            model=FOUR,
            layout=schedule(name),
            switches={"activation_recomputation": "selective"},
            micro_batches=4,
        )
        for name in SPLIT
        for tensor in (1, 2)
    ),
    *(  # experts, and ranks that share sequences
        Case(
            pipeline=2,
            data=data,
            context=context,
            expert=data,
            family="moe" if context == 1 else "gpt",
            model=FOUR,
            layout=schedule(name),
            documents=context > 1,
            micro_batches=4,
        )
        for name in SEVERAL
        for data, context in ((1, 1), (2, 1), (1, 2))
    ),
    *(
        Case(
            tensor=tensor,
            pipeline=2,
            family="llama",
            layout=schedule(name),
            switches={"activation_recomputation": what},
        )
        for name in ("interleaved_1f1b", "looped_bfs")
        for tensor in (1, 2)
        for what in ("selective", "full")
    ),
]

COMPILED = [
    Case(pipeline=2, family="llama", layout=schedule(name), switches={"compile": True})
    for name in ("interleaved_1f1b", "looped_bfs")
]
