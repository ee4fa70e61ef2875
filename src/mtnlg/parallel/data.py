"""Data parallelism: what replicas hold, by the names users know (docs/parallelism.md).

``ddp`` and ``zero1`` compute with whole weights, which :class:`~mtnlg.parallel.replicas.Replicas` keeps;
``zero2``, ``zero3`` and ``hybrid`` are FSDP2's (Zhao et al. 2023, arXiv 2304.11277) with these options:

=========  ========================  =========================  =========================
mode       weights are gathered      and freed                  gradients are reduced
=========  ========================  =========================  =========================
``zero2``  once a step               after its last backward    in every micro-batch
``zero3``  for each layer            after forward, backward    in every micro-batch
``hybrid`` as ``zero3``, in a group  after forward, backward    over groups: in the last
=========  ========================  =========================  =========================

FSDP is told to add gradients up and divide by nothing: the loss rule (division by the global number
of valid tokens) is the only owner of gradient scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from mtnlg.config import PrecisionConfig
from mtnlg.model import MegatronEncoderDecoder
from mtnlg.model.relative import RelativePositions
from mtnlg.parallel.expert import experts_axes, mixtures, part_experts
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.replicas import Replicas
from mtnlg.parallel.stage import Stage
from mtnlg.parallel.working_copy import Keeper, WorkingCopy

# Of the computation; ``None`` is that of the weights, float32.
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARDED = ("zero2", "zero3", "hybrid")
REDUCE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def frees_weights(mesh: Mesh) -> bool:
    """Whether replicas hold only parts of the weights, so that FSDP gathers and frees them."""
    return (
        mesh.layout.data_parallel_sharding in ("zero2", "zero3", "hybrid") and mesh.size("weight_part") > 1
    )


def make_memory(stage: Stage, mesh: Mesh) -> None:
    """Give ``stage``, which has been on the meta device, memory without values.

    Parameters that FSDP offloads live in the CPU's memory; everything else where it is computed with.
    """
    if not (frees_weights(mesh) and mesh.layout.cpu_offload):
        stage.to_empty(device=mesh.device)
        return
    stage.to_empty(device=torch.device("cpu"))
    for module in stage.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=mesh.device))


def shard_over_replicas(stage: Stage, mesh: Mesh, precision: PrecisionConfig) -> None:
    """Let FSDP shard ``stage`` over the replicas, where they hold only parts of the weights.

    Args:
        stage: one stage of this rank.
        mesh: this rank's place.
        precision: of the computation. Weights are cast as they are gathered, gradients travel in
            ``reduce_dtype`` and are added up in float32.
    """
    if not frees_weights(mesh):
        return
    axes = ["weight_part"] if mesh.size("weight_copy") == 1 else ["weight_copy", "weight_part"]
    reduce_dtype = REDUCE_DTYPES[precision.reduce_dtype]
    options: dict[str, Any] = {
        "mesh": mesh.axis(*axes),
        "mp_policy": MixedPrecisionPolicy(param_dtype=DTYPES[precision.dtype], reduce_dtype=reduce_dtype),
        "offload_policy": OffloadPolicy(),
    }
    if mesh.layout.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")
    frees_layers = mesh.layout.data_parallel_sharding != "zero2"
    if mesh.layout.expert_parallel_size > 1:
        own = options | {"mesh": experts_axes(mesh)}
        parts = partial(part_experts, num_parts=mesh.size("expert_part"))
        for block in mixtures(stage.decoder).values():
            fully_shard(block.experts, reshard_after_forward=frees_layers, shard_placement_fn=parts, **own)
    options["shard_placement_fn"] = partial(part_experts, num_parts=mesh.size("weight_part"))
    for layer in stage.decoder.layers.values():
        fully_shard(layer, reshard_after_forward=frees_layers, **options)
    # The ends stay gathered: the embedding's turn comes last in the backward, the head's first. The
    # stage itself stays a plain module: torch's pipeline would reduce gradients only after the last
    # micro-batch of any FSDP module, whatever its mode.
    fully_shard(stage.decoder, reshard_after_forward=False, **options)
    for module in fsdp_modules(stage):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def blocks_of(stage: Stage) -> list[nn.Module]:
    """The modules of ``stage`` that run one after the other and hold all its weights."""
    decoder = stage.decoder
    blocks = [decoder.embedding, *decoder.layers.values(), decoder.head]
    if isinstance(decoder, MegatronEncoderDecoder):
        positions = (decoder.encoder_positions, decoder.decoder_positions)
        # Their tables are looked up by themselves, too, to be sent to other stages.
        blocks += [table.buckets for table in positions if isinstance(table, RelativePositions)]
        blocks.append(decoder.encoder_end)
    return [block for block in blocks if block is not None]


def fsdp_modules(stage: Stage) -> list[FSDPModule]:
    """The modules of ``stage`` that FSDP shards."""
    return [module for module in stage.modules() if isinstance(module, FSDPModule)]


class BackwardCount:
    """Tells FSDP which backward pass is a stage's last of the step.

    Args:
        stage: one stage of this rank.
        mesh: this rank's place.
        precision: hybrid sharding adds up what its groups have not exchanged yet in the dtype of the
            exchange: in bf16 it exchanges in every micro-batch.
    """

    def __init__(self, stage: Stage, mesh: Mesh, precision: PrecisionConfig) -> None:
        self._root = stage.decoder if isinstance(stage.decoder, FSDPModule) else None
        self._keeps_weights = mesh.layout.data_parallel_sharding == "zero2"
        self._waits_for_copies = mesh.size("weight_copy") > 1 and precision.reduce_dtype == "float32"
        self._num_passes = self._passes = 0
        if self._root is not None:
            stage.register_forward_hook(self._on_forward)

    def begin(self, num_passes: int) -> None:
        """A step of ``num_passes`` backward passes begins."""
        self._num_passes, self._passes = num_passes, 0

    def _on_forward(self, stage: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        begun: list[bool] = []  # whichever gradient comes first begins the pass
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._on_backward, begun))

    def _on_backward(self, begun: list[bool], gradient: Tensor) -> None:
        assert self._root is not None
        if begun:
            return
        begun.append(True)
        self._passes += 1
        is_last = self._passes >= self._num_passes
        self._root.set_is_last_backward(is_last)
        if self._keeps_weights:
            self._root.set_reshard_after_backward(is_last)
        if self._waits_for_copies:
            self._root.set_requires_all_reduce(is_last)


def keep_weights(
    parameters: Mapping[str, nn.Parameter],
    stages: Sequence[Stage],
    mesh: Mesh,
    precision: PrecisionConfig,
    shared: Collection[str] = (),
) -> Keeper | None:
    """What keeps float32 masters beside weights that stay whole; ``None`` where weights are masters.

    Args:
        parameters: this rank's by canonical name, float32.
        stages: of this rank.
        mesh: this rank's place.
        precision: of the computation.
        shared: names of those that two stages of this rank use.
    """
    if mesh.device_mesh is not None and frees_weights(mesh):
        return None
    dtype = DTYPES[precision.dtype]
    device = torch.device("cpu") if mesh.layout.cpu_offload else None
    if mesh.device_mesh is not None and mesh.size("weight_copy") * mesh.size("weight_part") > 1:
        reduce_dtype = REDUCE_DTYPES[precision.reduce_dtype]
        replicas = Replicas(parameters, mesh, dtype, reduce_dtype, device, shared)
        blocks = [block for stage in stages for block in blocks_of(stage)]
        # A hook would be compiled with its layer, and no layer could use another's code.
        if not any(block._compiled_call_impl for block in blocks):
            replicas.wait_before(blocks)
        return replicas
    if dtype is None and device is None:
        return None
    return WorkingCopy(parameters, dtype or torch.float32, device)
