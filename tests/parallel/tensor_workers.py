"""What the tests of tensor parallelism run on ranks."""

from __future__ import annotations

from typing import Any

import torch
from tests.parallel.workers import SEED, make_batches, mesh_of
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig, TrainingConfig
from mtnlg.parallel import ParallelModel, lay_out
from mtnlg.parallel.gradients import local_part
from mtnlg.tokens.batch import Batch

SEQUENCE = 8


def dropout_masks(
    model_fields: dict[str, Any], layout_fields: dict[str, Any], switches: dict[str, Any], steps: list[int]
) -> list[dict[str, list[Any]]]:
    """What was dropped in each of the ``steps``: every pass of every dropout, in the order of passes.

    ``embedding`` and ``hidden``: which elements. ``attention``: which weights, [heads, queries, keys].
    ``gradients``: this rank's, of the unwatched model.
    """
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout_fields), SEED, switches=TrainingConfig(**switches))
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


def bias_of_output(model_fields: dict[str, Any], layout_fields: dict[str, Any]) -> float:
    """Largest element that the last projection of a block adds when its matrix is zero and its bias 1."""
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout_fields), SEED)
    layer = model.decoder.layers["0"]
    with torch.no_grad():
        for projection in (layer.attention.output, layer.mlp.down):
            projection.weight.zero_()
            projection.bias.fill_(1.0)
        length = SEQUENCE // (2 if layout_fields.get("sequence_parallel", True) else 1)
        hidden = torch.zeros(1, length, config.hidden_size)
        added = [layer.attention(hidden), layer.mlp(hidden)]
    assert all(torch.equal(item, torch.full_like(item, item.flatten()[0].item())) for item in added)
    return sum(item.flatten()[0].item() for item in added)


def shapes_of(model_fields: dict[str, Any], layout_fields: dict[str, Any]) -> dict[str, Any]:
    """Whole shapes by name, and how many numbers this rank holds of each."""
    model = lay_out(MegatronModelConfig(**model_fields), mesh_of(layout_fields), SEED)
    return {
        name: (tuple(item.shape), item.to_local().numel(), str(item.placements))  # type: ignore[attr-defined]
        for name, item in model.named_parameters()
    }


def logits_of(model_fields: dict[str, Any], layout_fields: dict[str, Any]) -> Any:
    """Logits of the first batch, as this rank gets them."""
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout_fields), SEED).eval()
    (batch,) = make_batches(config.vocab_size, 2, SEQUENCE, False, 1, 1)[0]
    with torch.no_grad():
        return model.stages[0](batch.input_ids).numpy().copy()
