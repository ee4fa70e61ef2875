"""Tensor and sequence parallelism: how each layer's matrices and activations are divided.

Queries, keys, values and the MLP's first matrices are split by output (heads, ffn columns), the two
projections back into the residual stream by input, so that a block needs one exchange before and one
after it (Shoeybi et al. 2019, arXiv 1909.08053). With sequence parallelism the residual stream, the
norms and dropout are split over the sequence and those exchanges become a gather and a
reduce-scatter (Korthikanti et al. 2022, arXiv 2205.05198). The embedding and the head are split over
the vocabulary, which need not divide.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from mtnlg.model import MegatronLmDecoder
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.vocabulary import VocabularyParallelLoss

SEQUENCE_DIM = 1


class OnWholeInputs(ParallelStyle):
    """Every rank runs the module on whole inputs, with its part of the weights, and keeps its part.

    Weights that stay whole become DTensors too: optimizers and checkpoints want all of one kind.
    The output is waited for, where torch's own styles hand on one that may still be under way, which
    a compiled layer does not take.

    Args:
        output: how the output is left to the next module.
        weights: how the weights are divided.
    """

    def __init__(self, output: Placement, weights: Placement | None = None) -> None:
        super().__init__()
        self.output = output
        self.weights = weights or Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def divide(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
            for key, weight in list(module.named_parameters(recurse=False)):
                divided = distribute_tensor(weight, mesh, [self.weights], src_data_rank=None)
                module.register_parameter(key, nn.Parameter(divided))

        def whole_input(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return tuple(DTensor.from_local(item, mesh, [Replicate()], run_check=False) for item in inputs)

        def part_of_output(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=[self.output]).to_local()

        return distribute_module(module, device_mesh, divide, whole_input, part_of_output)


def split_matrices(decoder: MegatronLmDecoder, mesh: Mesh) -> None:
    """Divide ``decoder`` over the tensor-parallel ranks, in place."""
    if mesh.tensor_size == 1:
        return
    device_mesh = mesh.axis("tensor")
    sequence_parallel = mesh.layout.sequence_parallel
    stream: Placement = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()
    norm = SequenceParallel(use_local_output=True) if sequence_parallel else OnWholeInputs(Replicate())
    plan: dict[str, ParallelStyle] = {}
    if decoder.embedding is not None:
        plan["embedding.tokens"] = OnWholeInputs(stream, weights=Shard(0))
        plan["embedding.positions"] = OnWholeInputs(stream)
    for index in decoder.layers:
        plan.update(_layer_plan(f"layers.{index}", stream, norm))
    if decoder.head is not None:
        plan["head.norm"] = norm
        gathers = not decoder.config.parallel_output
        plan["head.output"] = ColwiseParallel(
            input_layouts=stream, output_layouts=Replicate() if gathers else Shard(-1)
        )
        decoder.head.loss_function = VocabularyParallelLoss(device_mesh, stream, gathers)
    present = {name for name, _ in decoder.named_modules()}
    parallelize_module(decoder, device_mesh, {name: plan[name] for name in plan if name in present})
    decoder.tie_weights()  # ``parallelize_module`` gives each user of a tied matrix its own


def _layer_plan(layer: str, stream: Placement, norm: ParallelStyle) -> dict[str, ParallelStyle]:
    def gathered(arguments: int) -> PrepareModuleInput:
        # The block works on a DTensor of the whole sequence, so that the gradients of its two or three
        # first matrices are added before one reduction takes them back.
        rest = (None,) * (arguments - 1)
        return PrepareModuleInput(input_layouts=(stream, *rest), desired_input_layouts=(Replicate(), *rest))

    heads_dim = 1
    head_norm = SequenceParallel(sequence_dim=heads_dim, use_local_output=True)
    return {
        f"{layer}.attention_norm": norm,
        f"{layer}.attention": gathered(4),
        f"{layer}.attention.query": ColwiseParallel(),
        f"{layer}.attention.key": ColwiseParallel(),
        f"{layer}.attention.value": ColwiseParallel(),
        f"{layer}.attention.query_norm": head_norm,
        f"{layer}.attention.key_norm": head_norm,
        f"{layer}.attention.output": RowwiseParallel(output_layouts=stream),
        f"{layer}.mlp_norm": norm,
        f"{layer}.mlp": gathered(1),
        f"{layer}.mlp.gate": ColwiseParallel(),
        f"{layer}.mlp.up": ColwiseParallel(),
        f"{layer}.mlp.down": RowwiseParallel(output_layouts=stream),
    }
