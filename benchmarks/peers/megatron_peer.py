"""megatron-core's GPTModel from its local (unfused) layer specification, one rank, gloo or NCCL.

In bf16 its model holds bf16 weights, as Megatron's own. Its mixed-precision optimizer accepts CUDA
tensors only, so on a CPU float32 masters are kept by the same loop that its optimizer runs.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist

from peers import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Contender, Shape, count, random_tokens

warnings.filterwarnings("ignore")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402


def build(shape: Shape, precision: str, device: str, threads: int) -> Contender:
    _join_alone(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=precision == "bf16",
        pipeline_dtype=dtype,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=shape.vocab,
        max_sequence_length=shape.sequence,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    model = model.to(device=device, dtype=dtype).train()
    return Contender(count(model), {"eager": _step(model, shape, device)}, "compiles only on a GPU")


def _join_alone(device: str) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    if not dist.is_initialized():
        store = dist.HashStore()
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    if device == "cuda":
        model_parallel_cuda_manual_seed(0)
    else:
        # Its attention asks for buffers and for a random stream of the current CUDA device, whatever
        # the model's.
        get_cuda_rng_tracker().fork = lambda name="": contextlib.nullcontext()  # type: ignore[method-assign]
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]


def _step(model: torch.nn.Module, shape: Shape, device: str) -> Callable[[], float]:
    tokens = random_tokens(shape, device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(shape.sequence, device=device).expand_as(inputs).contiguous()
    mask = torch.ones(shape.sequence, shape.sequence, dtype=torch.bool, device=device).triu(1)[None, None]
    weights = list(model.parameters())
    mixed = weights[0].dtype != torch.float32
    masters = [w.detach().float().clone() if mixed else w for w in weights]
    groups = [
        {"params": [m for m in masters if m.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def run() -> float:
        loss = model(inputs, positions, mask, labels=labels).float().mean()
        loss.backward()
        if mixed:
            for master, weight in zip(masters, weights):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if mixed:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return loss.item()

    return run
