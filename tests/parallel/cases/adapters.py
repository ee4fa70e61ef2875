"""Adapters: low-rank updates, virtual tokens and prefixes in every direction of dividing."""

from __future__ import annotations

from typing import Any

from tests.parallel.parity import SEVEN, Case

LORA: dict[str, Any] = {"method": "lora", "rank": 3, "target_modules": ["all-linear"]}
DORA = {**LORA, "decomposed": True}
STABILIZED = {**LORA, "rank_stabilized": True}
PROMPT: dict[str, Any] = {"method": "prompt", "num_virtual_tokens": 4}
PREFIX = {**PROMPT, "method": "prefix"}
ENDS = {**LORA, "target_modules": ["attention.query", "embedding.tokens", "head.output"]}
DORA_HEAD = {**DORA, "target_modules": ["mlp.up", "head.output"]}
METHODS = (LORA, DORA, PROMPT, PREFIX)
FULL = {"activation_recomputation": "full"}
OPERATORS = {"activation_recomputation": "operators", "recomputed_operators": ["linear", "normalization"]}

SLICE = [
    Case(tensor=2, adapter=DORA),
    Case(tensor=2, family="llama", adapter=PROMPT, documents=True),
    Case(tensor=2, tied=False, layout={"sequence_parallel": False}, adapter=PREFIX),
    Case(pipeline=2, adapter=PROMPT, switches=FULL),
    Case(pipeline=2, family="llama", tied=False, adapter=LORA),
    Case(data=2, adapter=LORA, switches=OPERATORS),
    Case(data=2, family="llama", layout={"data_parallel_sharding": "zero3"}, adapter=DORA),
    Case(data=2, layout={"data_parallel_sharding": "ddp"}, adapter=PREFIX, documents=True),
    Case(tensor=2, pipeline=2, family="llama", adapter=PREFIX, documents=True),
    Case(tensor=2, data=2, tied=False, layout={"data_parallel_sharding": "zero3"}, adapter=LORA),
    Case(tensor=2, pipeline=2, adapter=ENDS),
    Case(tensor=2, data=2, tied=False, layout={"data_parallel_sharding": "zero3"}, adapter=DORA_HEAD),
]

CASES = [
    *(
        Case(*sizes, family=family, adapter=adapter)
        for sizes in SEVEN
        for family in ("gpt", "llama", "moe")
        for adapter in METHODS
        if not (family == "moe" and adapter is DORA)
    ),
    *(Case(*sizes, adapter=STABILIZED) for sizes in SEVEN),
    *(Case(*sizes, tied=tied, adapter=ENDS) for sizes in SEVEN for tied in (True, False)),
    *(Case(*sizes, family="llama", adapter=DORA_HEAD) for sizes in SEVEN),
    *(Case(tensor=2, layout={"sequence_parallel": False}, adapter=one) for one in (ENDS, DORA_HEAD)),
    *(Case(data=2, model={"parallel_output": False}, tensor=2, adapter=one) for one in (ENDS, DORA_HEAD)),
    *(
        Case(*sizes, adapter={**PROMPT, "prompt_style": style})
        for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2))
        for style in ("append", "both")
    ),
    *(
        Case(data=2, layout={"data_parallel_sharding": sharding}, adapter=adapter)
        for sharding in ("ddp", "zero1", "zero2", "zero3")
        for adapter in METHODS
    ),
    *(
        Case(tensor=4, family="llama", adapter=adapter)  # ranks share key and value heads
        for adapter in METHODS
    ),
    *(Case(context=2, adapter=adapter, documents=True) for adapter in (LORA, DORA, ENDS)),
    *(Case(*sizes, adapter=LORA, precision={"dtype": "bf16"}) for sizes in SEVEN),
]
