"""megatron-core's own layouts on CPU ranks: its tensor and sequence parallel layers, its pipeline
schedule, its data-parallel gradient buffers.

It takes the current CUDA device for granted wherever it makes a buffer; here that device is the CPU.
Its optimizer accepts CUDA tensors only, so torch's fused AdamW steps the gradients of its buffers.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from peers import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Shape, random_tokens

warnings.filterwarnings("ignore")
os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # it refuses sequence parallelism without

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules  # noqa: E402


def build(shape: Shape, sizes: dict[str, int], micro_batches: int) -> Callable[[], float]:
    """A step over ``micro_batches`` of all replicas; sizes are of ``tensor``, ``pipeline`` and ``data``."""
    _compute_on_the_cpu()
    tensor, pipeline, data = (sizes.get(name, 1) for name in ("tensor", "pipeline", "data"))
    parallel_state.initialize_model_parallel(tensor, pipeline)
    model = _model(shape, tensor, pipeline)
    rows = shape.batch // micro_batches
    tokens = random_tokens(shape, "cpu").split(rows)[parallel_state.get_data_parallel_rank() :: data]
    run_schedule = get_forward_backward_func()
    optimizer = _optimizer(model)
    losses: list[Tensor] = []

    def step() -> float:
        model.zero_grad_buffer()
        losses.clear()
        run_schedule(
            forward_step_func=_forward_step(shape, losses, data),
            data_iterator=iter(tokens),
            model=[model],
            num_microbatches=len(tokens),
            seq_length=shape.sequence,
            micro_batch_size=rows,
            forward_only=False,
        )
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        _clip(model)
        optimizer.step()
        return float(torch.stack(losses).mean()) if losses else 0.0

    return step


def _compute_on_the_cpu() -> None:
    get_cuda_rng_tracker().fork = lambda name="": contextlib.nullcontext()  # type: ignore[method-assign]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor, *arguments, **options: tensor  # type: ignore[method-assign]
    zeros = torch.zeros

    def zeros_on_the_cpu(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return zeros(*size, device="cpu" if device == "cuda" else device, **options)

    torch.zeros = zeros_on_the_cpu  # type: ignore[assignment]


class Norm(torch.nn.LayerNorm):
    """Its own norms that know sequence parallelism need CUDA; this is torch's with the mark they set."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # its gradient is summed at the end


def _layers(count: int) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm)


def _model(shape: Shape, tensor: int, pipeline: int) -> DistributedDataParallel:
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        sequence_parallel=tensor > 1,
        batch_p2p_comm=False,  # gloo pairs single sends and receives; a batch of both is NCCL's
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config,
        _layers(shape.layers // pipeline),
        vocab_size=-(-shape.vocab // tensor) * tensor,  # it must divide
        max_sequence_length=shape.sequence,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrapped = DistributedDataParallel(config, settings, model).train()
    config.no_sync_func = wrapped.no_sync  # gradients are summed once, after the last micro-batch
    return wrapped


def _optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)


def _forward_step(shape: Shape, losses: list[Tensor], data: int) -> Callable[..., Any]:
    mask = torch.ones(shape.sequence, shape.sequence, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(shape.sequence)[None]

    def mean(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = output.float().mean()
        losses.append(loss.detach().clone())  # the schedule divides the loss in place
        return loss, {}

    def forward_step(batches: Iterator[Tensor], model: torch.nn.Module) -> Any:
        tokens = next(batches)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return model(inputs, positions.expand_as(inputs).contiguous(), mask, labels=labels), mean

    return forward_step


def _clip(model: torch.nn.Module) -> None:
    """To norm 1, over the ranks that hold parts of the model."""
    gradients = [
        parameter.grad
        for parameter in model.parameters()
        if getattr(parameter, "tensor_model_parallel", False)
        or parallel_state.get_tensor_model_parallel_rank() == 0
    ]
    total = torch.stack(torch._foreach_norm(gradients)).square().sum()
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    factor = (CLIP / (total.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([parameter.grad for parameter in model.parameters()], factor)
