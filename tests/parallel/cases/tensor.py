"""Tensor and sequence parallelism: shared heads, biases, norms of heads, both ways of the loss."""

from __future__ import annotations

from tests.parallel.parity import Case

# Norms over heads of a few numbers are so steep that three steps of AdamW multiply the rounding.
TWO_HEADS = {"num_key_value_heads": 2, "num_attention_heads": 8, "hidden_size": 32}
ONE_HEAD = {"num_key_value_heads": 1, "hidden_size": 32}
WHOLE_STREAM = {"sequence_parallel": False}
GPT_SHARED = {**ONE_HEAD, "qk_normalization": True, "position_embedding": "rotary"}

SLICE = [
    Case(tensor=2, family="llama", model={**ONE_HEAD, "attention_bias": True}),
    Case(tensor=4, family="llama", model=TWO_HEADS, tied=False),
    Case(tensor=4, model=GPT_SHARED, layout=WHOLE_STREAM),
]

CASES = [
    *(
        Case(tensor=tensor, family=family, tied=tied, model=model, layout=layout)
        for tensor in (2, 4)
        for family in ("gpt", "llama")
        for tied in (True, False)
        for model in (ONE_HEAD, {**TWO_HEADS, "parallel_output": False})
        for layout in ({}, WHOLE_STREAM)
    ),
    *(
        Case(tensor=2, model={"attention_output_bias": output, "mlp_bias": mlp}, layout=layout)
        for output in (True, False)
        for mlp in (True, False)
        for layout in ({}, WHOLE_STREAM)
    ),
    *(
        Case(tensor=2, family="llama", model={"activation_function": activation})
        for activation in ("gelu_tanh", "relu", "squared_relu", "silu", "geglu", "reglu")
    ),
    Case(tensor=4, pipeline=2, family="llama", model=TWO_HEADS, documents=True),
    Case(tensor=4, pipeline=2, model=GPT_SHARED, layout=WHOLE_STREAM, tied=False),
    Case(tensor=4, data=2, family="llama", model=ONE_HEAD),
    Case(tensor=4, data=2, family="llama", model=TWO_HEADS, layout={"data_parallel_sharding": "zero3"}),
    Case(tensor=4, data=2, model=GPT_SHARED, precision={"dtype": "bf16"}),
    Case(tensor=2, family="llama", model=ONE_HEAD, switches={"activation_recomputation": "full"}),
    Case(tensor=8, family="llama", model={**ONE_HEAD, "num_attention_heads": 8, "intermediate_size": 40}),
]
