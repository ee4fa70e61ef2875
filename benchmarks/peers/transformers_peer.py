"""Hugging Face transformers' GPT-2 with what its Trainer does: autocast, clipping, fused AdamW."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peers import Contender, Shape, count, plain_steps, random_tokens


def build(shape: Shape, precision: str, device: str, threads: int) -> Contender:
    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.sequence,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config).to(device).train()
    tokens = random_tokens(shape, device)[:, :-1].contiguous()

    def loss_of(module: torch.nn.Module) -> torch.Tensor:
        return module(tokens, labels=tokens).loss

    return Contender(count(model), plain_steps(model, loss_of, precision, device))
