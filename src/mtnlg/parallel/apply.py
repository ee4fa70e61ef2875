"""The one place where a layout is applied, in the one order that works (docs/layout-order.md)."""

from __future__ import annotations

import torch

from mtnlg.config import MegatronModelConfig
from mtnlg.model import MegatronLmDecoder
from mtnlg.parallel.cpu_kernels import use_cpu_kernels
from mtnlg.parallel.data import shard_over_replicas
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.model import ParallelModel
from mtnlg.parallel.pipeline import cut_stage
from mtnlg.parallel.recompute import compile_layers, recompute_activations
from mtnlg.parallel.stage import Stage
from mtnlg.parallel.tensor import split_matrices
from mtnlg.parallel.weights import initialize

# Of the computation; ``None`` is that of the weights, float32.
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def lay_out(
    config: MegatronModelConfig,
    mesh: Mesh,
    seed: int = 1234,
    precision: str = "float32",
    recomputation: str = "none",
    compile: bool = False,
) -> ParallelModel:
    """Build the model of ``config`` on ``mesh``, with the same first weights in every layout.

    Args:
        config: the architecture.
        mesh: this rank's place in the layout.
        seed: of the initialisation.
        precision: ``float32``, ``bf16`` or ``fp16``.
        recomputation: ``none``, ``selective`` or ``full``.
        compile: ``torch.compile`` each layer.
    """
    with torch.device("meta"):  # nothing is allocated before it is known which part is ours
        decoder = MegatronLmDecoder(config)
    cut_stage(decoder, mesh)
    split_matrices(decoder, mesh)
    if mesh.device.type == "cpu":
        use_cpu_kernels(decoder, is_divided=mesh.tensor_size > 1)
    recompute_activations(decoder, recomputation)
    if compile:
        compile_layers(decoder)
    shards = mesh.tensor_size if mesh.layout.sequence_parallel else 1
    stage = Stage(decoder, sequence_shards=shards)
    dtype = DTYPES[precision]
    shard_over_replicas(stage, mesh, dtype)
    stage.to_empty(device=mesh.device)
    decoder.tie_weights()  # ``to_empty`` gives a shared parameter two memories
    initialize(stage, config, seed)
    return ParallelModel(stage, config, mesh, dtype)
