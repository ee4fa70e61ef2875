"""Data parallelism: FSDP2 over the replicas.

FSDP is told to add gradients up and divide by nothing: the loss rule (division by the global number
of valid tokens) is the only owner of gradient scale.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage


def shard_over_replicas(stage: Stage, mesh: Mesh, dtype: torch.dtype | None = None) -> None:
    """Shard ``stage`` over the replicas as ``layout.data_parallel_sharding`` says.

    ``full`` frees a layer's gathered weights after its forward (ZeRO-3), ``gradients`` keeps them for
    the backward (ZeRO-2), ``none`` keeps whole replicas: a mesh that only replicates (``shard`` is 1).

    Args:
        stage: this rank's part of the model.
        mesh: this rank's place.
        dtype: of the computation where it is not float32. Weights are cast as they are gathered and
            gradients are added up in float32; a single replica is wrapped for that alone.
    """
    if mesh.device_mesh is None or (mesh.num_replicas == 1 and dtype is None):
        return
    sharding = mesh.layout.data_parallel_sharding
    axes = mesh.axis("replicate", "shard") if sharding == "none" else mesh.axis("shard")
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frees_layers = sharding == "full" and mesh.num_replicas > 1
    for layer in stage.decoder.layers.values():
        fully_shard(layer, mesh=axes, reshard_after_forward=frees_layers, mp_policy=precision)
    # The ends stay gathered: the embedding's turn comes last in the backward, the head's first.
    fully_shard(stage, mesh=axes, reshard_after_forward=False, mp_policy=precision)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
