"""litgpt's GPT as its pretraining command runs it: rotary positions, tied head, bf16-mixed."""

from __future__ import annotations

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

from peers import Contender, Shape, count, plain_steps, random_tokens


def build(shape: Shape, precision: str, device: str, threads: int) -> Contender:
    config = Config(
        block_size=shape.sequence,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.hidden,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=True,
        attn_bias=True,
        lm_head_bias=False,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
    )
    model = GPT(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.02)
    model.lm_head.weight = model.transformer.wte.weight
    model = model.to(device).train()
    model.max_seq_length = shape.sequence
    tokens = random_tokens(shape, device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def loss_of(module: torch.nn.Module) -> torch.Tensor:
        return chunked_cross_entropy(module(inputs), labels, chunk_size=0)

    note = "rotary positions (it has no learned ones)"
    return Contender(count(model), plain_steps(model, loss_of, precision, device), note)
