"""Data parallelism: FSDP2 over the replicas.

FSDP is told to add gradients up and divide by nothing: the loss rule (division by the global number
of valid tokens) is the only owner of gradient scale.
"""

from __future__ import annotations

from torch.distributed.fsdp import FSDPModule, fully_shard

from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage


def shard_over_replicas(stage: Stage, mesh: Mesh) -> None:
    """Shard ``stage`` over the replicas as ``layout.data_parallel_sharding`` says.

    ``full`` frees a layer's gathered weights after its forward (ZeRO-3), ``gradients`` keeps them for
    the backward (ZeRO-2), ``none`` keeps whole replicas: a mesh that only replicates (``shard`` is 1).
    """
    if mesh.num_replicas == 1:
        return
    sharding = mesh.layout.data_parallel_sharding
    axes = mesh.axis("replicate", "shard") if sharding == "none" else mesh.axis("shard")
    for layer in stage.decoder.layers.values():
        fully_shard(layer, mesh=axes, reshard_after_forward=sharding == "full")
    # The ends stay gathered: the embedding's turn comes last in the backward, the head's first.
    fully_shard(stage, mesh=axes, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
