"""Asynchronous tensor parallelism: parts of a product are computed while other parts are on their way.

torch's compiler replaces a gather and the products after it, and a product and the reduce-scatter after
it, by operators that do both in pieces over memory that GPUs share (Wang et al. 2023, "Overlap
Communication with Dependent Computation via Decomposition in Large Deep Learning Models"). Results
are sums in another order, otherwise the same.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config import ConfigError, TrainingConfig
from mtnlg.config.tensor_rules import async_tensor_obstacle, refusal
from mtnlg.parallel.mesh import Mesh

_log = logging.getLogger("mtnlg.parallel")
_said: set[str] = set()


def use_async_tensor_parallel(mesh: Mesh, switches: TrainingConfig) -> bool:
    """Switch it on where the layout wants it and everything allows it; rank 0 says so once.

    Raises:
        ConfigError: ``layout.async_tensor_parallel`` is true and cannot be.
    """
    layout = mesh.layout
    if layout.async_tensor_parallel is False or (
        mesh.tensor_size == 1 and not layout.async_tensor_parallel
    ):
        return False
    obstacle = async_tensor_obstacle(layout, switches, mesh.device.type) or _machine_obstacle(mesh)
    if obstacle:
        if layout.async_tensor_parallel:
            raise ConfigError(refusal(obstacle))
        return False
    _switch_on(mesh)
    if mesh.is_main and not _said:
        _said.add("on")
        _log.warning(
            "asynchronous tensor parallelism is on: GPUs send while they multiply "
            "(layout.async_tensor_parallel: false switches it off)."
        )
    return True


def linear_then_bias(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in two operators, of which the compiler can join the first with its exchange."""
    product = F.linear(inputs, weight)
    return product if bias is None else product + bias


def _machine_obstacle(mesh: Mesh) -> str:
    """What about the machine or torch is in the way; empty if nothing is."""
    import torch._inductor.config as compiler

    if not hasattr(compiler, "_micro_pipeline_tp"):
        return f"torch {torch.__version__} cannot do it"
    if mesh.layout.backend == "gloo":
        return "it needs layout.backend: nccl"
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.num_ranks))
    if ranks_here % mesh.tensor_size:
        return "the ranks that share a matrix are spread over several machines"
    mine = mesh.device.index or 0
    for other in range(mine - mesh.tensor_rank, mine - mesh.tensor_rank + mesh.tensor_size):
        if other != mine and not torch.cuda.can_device_access_peer(mine, other):
            return f"GPU {mine} cannot read the memory of GPU {other} (no NVLink between them)"
    return ""


def _switch_on(mesh: Mesh) -> None:
    import torch._inductor.config as compiler
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    compiler._micro_pipeline_tp = True
    with warnings.catch_warnings():
        # Called a relic since torch 2.13, whose compiler still asks whether it was called.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.axis("tensor").get_group().group_name)
