"""What the tests of tensor parallelism run on ranks."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from tests.parallel.parity import layout_fields
from tests.parallel.workers import SEED, make_batches, mesh_of
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig, TrainingConfig
from mtnlg.parallel import ParallelModel, lay_out
from mtnlg.parallel.async_tensor import linear_then_bias
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.gradients import local_part
from mtnlg.tokens.batch import Batch

SEQUENCE = 8


def dropout_masks(
    model_fields: dict[str, Any], layout: dict[str, Any], switches: dict[str, Any], steps: list[int]
) -> list[dict[str, list[Any]]]:
    """What was dropped in each of the ``steps``: every pass of every dropout, in the order of passes.

    ``embedding`` and ``hidden``: which elements. ``attention``: which weights, [heads, queries, keys].
    ``gradients``: this rank's, of the unwatched model.
    """
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout), SEED, switches=TrainingConfig(**switches))
    batches = make_batches(config.vocab_size, 2, SEQUENCE, False, 1, 1)[0]
    gradients = {step: _gradients(model, batches, step) for step in steps}
    masks: dict[str, list[Any]] = {"embedding": [], "hidden": [], "attention": []}
    for stage in model.stages:
        if stage.decoder.embedding is not None:
            _watch(stage.decoder.embedding.dropout, masks["embedding"])
        for layer in stage.decoder.layers.values():
            _watch(layer.dropout, masks["hidden"])
            inner = layer.attention.attention_function
            layer.attention.attention_function = _watched(inner, masks["attention"])
    found = []
    for step in steps:
        for passes in masks.values():
            passes.clear()
        _gradients(model, batches, step)
        found.append(
            {name: list(passes) for name, passes in masks.items()} | {"gradients": gradients[step]}
        )
    return found


def _gradients(model: ParallelModel, batches: list[Batch], step: int) -> list[Any]:
    model.train()
    model.seed_dropout(SEED, step)
    model.forward_backward(batches, 1.0)
    gradients = [local_part(item.grad).numpy().copy() for _, item in model.named_parameters()]
    model.zero_gradients()
    return gradients


def _watch(dropout: nn.Module, masks: list[Any]) -> None:
    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        masks.append(((output == 0) & (inputs[0] != 0)).numpy().copy())

    dropout.register_forward_hook(note)


def _watched(function: Any, masks: list[Any]) -> Any:
    """``function`` with values that are the identity, so that the weights themselves come out.

    Forward is all that is watched: gradients of values pass through the identity's place unused.
    """

    def watched(
        query: Tensor, key: Tensor, value: Tensor, mask: Any = None, dropout: float = 0.0
    ) -> Tensor:
        length = query.shape[2]
        identity = torch.eye(length, value.shape[-1]).expand_as(value)
        weights = function(query, key, identity, mask, dropout)
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        masks.append(((weights[0, :, :, :length] == 0) & seen).numpy().copy())
        return weights + 0.0 * value.sum()

    return watched


def bias_of_output(model_fields: dict[str, Any], layout: dict[str, Any]) -> float:
    """Largest element that the last projection of a block adds when its matrix is zero and its bias 1."""
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout), SEED)
    layer = model.decoder.layers["0"]
    with torch.no_grad():
        for projection in (layer.attention.output, layer.mlp.down):
            projection.weight.zero_()
            projection.bias.fill_(1.0)
        length = SEQUENCE // (2 if layout.get("sequence_parallel", True) else 1)
        hidden = torch.zeros(1, length, config.hidden_size)
        added = [layer.attention(hidden), layer.mlp(hidden)]
    assert all(torch.equal(item, torch.full_like(item, item.flatten()[0].item())) for item in added)
    return sum(item.flatten()[0].item() for item in added)


def shapes_of(model_fields: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Whole shapes by name, and how many numbers this rank holds of each."""
    model = lay_out(MegatronModelConfig(**model_fields), mesh_of(layout), SEED)
    return {
        name: (tuple(item.shape), item.to_local().numel(), str(item.placements))  # type: ignore[attr-defined]
        for name, item in model.named_parameters()
    }


def logits_of(model_fields: dict[str, Any], layout: dict[str, Any]) -> Any:
    """Logits of the first batch, as this rank gets them."""
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout), SEED).eval()
    (batch,) = make_batches(config.vocab_size, 2, SEQUENCE, False, 1, 1)[0]
    with torch.no_grad():
        return model.stages[0](batch.input_ids).numpy().copy()


def exchanges_after_the_compiler() -> dict[str, int]:
    """What the compiler makes of a block's exchanges, forward and backward, as for a GPU.

    The graph is traced without data and nothing is sent: the operators need GPUs to run.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch.distributed._symmetric_memory import _test_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    axis = TensorAxis(mesh_of(layout_fields(2, 1, 1)).axis("tensor"), splits_sequence=True)

    def block(*inputs: Tensor) -> tuple[Tensor, ...]:
        hidden, up, bias, down = (item.detach().requires_grad_() for item in inputs)
        columns = nn.functional.gelu(linear_then_bias(axis.enter(hidden), up, bias))
        output = axis.leave(linear_then_bias(columns, down, None))
        return output, *torch.autograd.grad(output.sum(), (hidden, up, bias, down))

    shapes = [(2, 8, 16), (32, 16), (32,), (16, 32)]
    inputs = [torch.empty(*shape, device="meta") for shape in shapes]
    graph = make_fx(block, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    view_to_reshape(graph)
    with _test_mode(), patch("torch.distributed.is_nccl_available", return_value=True):
        micro_pipeline_tp_pass(graph.graph)
    targets = [str(node.target) for node in graph.graph.nodes]
    return {
        "gathers": sum("fused_all_gather_matmul" in target for target in targets),
        "scatters": sum("fused_matmul_reduce_scatter" in target for target in targets),
        "left": sum("_c10d_functional" in target for target in targets),
    }


def compiled_whole(model_fields: dict[str, Any], layout: dict[str, Any]) -> float:
    """Largest difference that tracing makes to a block which the compiler must take as one graph."""
    config = MegatronModelConfig(**model_fields)
    layer = lay_out(config, mesh_of(layout), SEED).decoder.layers["0"]
    worst = 0.0
    for block in (layer.mlp_norm, layer.mlp):
        results = []
        for forward in (block.forward, torch.compile(block.forward, backend="aot_eager", fullgraph=True)):
            hidden = torch.linspace(-1.0, 1.0, 4 * config.hidden_size).view(1, 4, -1).requires_grad_()
            output = forward(hidden)
            output.square().sum().backward()
            results.append((output.detach(), hidden.grad))
        worst = max(worst, *((one - other).abs().max().item() for one, other in zip(*results)))
    return worst
