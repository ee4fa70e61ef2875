"""Data parallelism: FSDP2 over the replicas.

FSDP is told to add gradients up and divide by nothing: the loss rule (division by the global number
of valid tokens) is the only owner of gradient scale.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mtnlg.config import PrecisionConfig
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage

# Of the computation; ``None`` is that of the weights, float32.
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
REDUCE_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def shard_over_replicas(stage: Stage, mesh: Mesh, precision: PrecisionConfig) -> None:
    """Shard ``stage`` over the replicas as ``layout.data_parallel_sharding`` says.

    Args:
        stage: one stage of this rank.
        mesh: this rank's place.
        precision: of the computation. Weights are cast as they are gathered and gradients are added
            up in ``reduce_dtype``; in 16 bits a single replica is wrapped for that alone.
    """
    dtype = DTYPES[precision.dtype]
    copies, parts = mesh.size("weight_copy"), mesh.size("weight_part")
    if mesh.device_mesh is None or (copies * parts == 1 and dtype is None):
        return
    axes = mesh.axis("weight_copy", "weight_part") if copies > 1 else mesh.axis("weight_part")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=REDUCE_DTYPES[precision.reduce_dtype])
    frees_layers = mesh.layout.data_parallel_sharding in ("zero3", "hybrid") and parts > 1
    for layer in stage.decoder.layers.values():
        fully_shard(layer, mesh=axes, reshard_after_forward=frees_layers, mp_policy=policy)
    # The ends stay gathered: the embedding's turn comes last in the backward, the head's first.
    fully_shard(stage, mesh=axes, reshard_after_forward=False, mp_policy=policy)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
