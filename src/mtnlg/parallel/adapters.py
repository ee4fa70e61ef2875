"""Adapters in a laid-out model: which rank holds what of them, and texts with virtual tokens in them.

A low-rank update is divided like the matrix beside it: B with the outputs where those are split, A with
the inputs where those are, the other whole on every rank with its share of the gradient. Where inputs are
split the update is added before the sum over ranks that the layer ends in, so no layer sends more than
without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from mtnlg.config.adapter import EMBEDDING_TARGET, HEAD_TARGET, AdapterConfig
from mtnlg.config.errors import ConfigError
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import (
    PROMPT_NAME,
    adapted_linears,
    first_tokens,
    prefixed,
    put_adapter,
)
from mtnlg.model.low_rank import CHILD, LowRankUpdate, dense_weight, low_rank_of
from mtnlg.model.virtual_tokens import numbers_in_front, rows_with_virtual, source_with_virtual
from mtnlg.parallel.exchange import TensorAxis, all_reduce
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.quantized import Part, part_of, row_quantized, whole_row_norms
from mtnlg.parallel.tensor import (
    COLUMN,
    COPY,
    ROW,
    Product,
    distribute,
    head_linear,
    local_weight,
    row_linear,
)
from mtnlg.parallel.weights import TIED_ORIGINAL, local_slice, whole_tensor
from mtnlg.quantization import QuantizedLinear
from mtnlg.tokens.batch import Batch

if TYPE_CHECKING:
    from mtnlg.parallel.model import ParallelModel


def lay_out_adapter(decoder: MegatronLmDecoder, config: AdapterConfig, mesh: Mesh) -> None:
    """Put an adapter into a stage whose own matrices are divided already."""
    put_adapter(decoder, config, inserts=False)
    if decoder.embedding is not None and mesh.num_stages > 1:
        decoder.embedding.require_grads = True  # what a stage sends must have a gradient
    if mesh.tensor_size == 1:
        return
    axis = TensorAxis(mesh.axis("tensor"), mesh.layout.sequence_parallel)
    for name, linear in adapted_linears(decoder):
        if name == EMBEDDING_TARGET:
            _copy_look_up(linear, axis)
        elif name == HEAD_TARGET:
            _divide_heads_update(linear, axis, decoder.config.vocab_size)
        else:
            _divide_update(linear, axis)
    for _, attention in prefixed(decoder):
        _divide_prefix(attention.get_submodule("prefix"), decoder.config.key_value_heads, axis)
    if decoder.embedding is not None and "prompt" in decoder.embedding._modules:
        prompt = decoder.embedding.get_submodule("prompt")
        distribute(prompt, axis, weight=COPY)
        prompt.local = partial(local_weight, gradient=axis.stream_gradient)  # type: ignore[assignment]
        prompt.part = axis.part_of_sequence  # type: ignore[assignment]


def with_virtual_tokens(batch: Batch, config: AdapterConfig | None, vocab_size: int) -> Batch:
    """A batch as the model with this adapter reads it.

    Raises:
        ConfigError: documents share samples, and virtual tokens do not all stand before them.
    """
    if config is None or not config.num_positions:
        return batch
    if batch.decoder_input_ids is not None:  # what an encoder reads
        source, mask = source_with_virtual(config, vocab_size, batch.input_ids, batch.encoder_mask)
        return replace(batch, input_ids=source, encoder_mask=mask)
    front = numbers_in_front(config)
    if batch.document_ids is not None and front < config.num_positions:
        raise ConfigError(
            f"prompt_style is {config.prompt_style}: samples of several documents have their virtual "
            "tokens in front; use prepend, or one document a sample (tuning.packing: false)."
        )
    ids, labels, positions, documents, _ = rows_with_virtual(
        config, vocab_size, batch.input_ids, batch.labels, batch.position_ids, batch.document_ids
    )
    assert labels is not None
    lengths = None if batch.prefix_lengths is None else batch.prefix_lengths + front
    return replace(
        batch,
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        document_ids=documents,
        prefix_lengths=lengths,
    )


@torch.no_grad()
def start_laid_out_adapter(
    model: ParallelModel, config: AdapterConfig, seed: int, text_ids: Sequence[int] = ()
) -> None:
    """First values that follow from the base's weights, which ``model`` has; every rank calls this.

    The others :func:`~mtnlg.parallel.apply.lay_out` has drawn.

    Args:
        model: laid out with ``config``.
        config: the adapter.
        seed: of the run.
        text_ids: of ``config.init_text``.
    """
    weights = model.state_dict()
    for name, target in weights.items():
        if name.endswith(f".{CHILD}.magnitude"):
            norms = _row_norms(model, name.removesuffix(f".{CHILD}.magnitude"))
            _local(target).copy_(local_slice(norms, target))
        elif name == PROMPT_NAME:
            tokens = first_tokens(config, model.config.vocab_size, seed, text_ids)
            rows = whole_tensor(weights["embedding.tokens.weight"])[tokens]
            if model.config.embedding_scale is not None:
                rows = rows * rows.new_tensor(model.config.embedding_scale)
            _local(target).copy_(local_slice(rows, target))


def _row_norms(model: ParallelModel, linear: str) -> Tensor:
    """Lengths of the rows of the whole matrix of a linear layer of this rank's, [out]."""
    weights = dict(model.named_parameters())
    weight = weights.get(f"{linear}.weight")
    if weight is None and linear == HEAD_TARGET:  # tied
        weight = weights.get(TIED_ORIGINAL)
    if weight is not None:
        return torch.linalg.vector_norm(whole_tensor(weight.detach()).float(), dim=1)
    (found,) = [
        module for stage in model.stages for name, module in stage.decoder.named_modules() if name == linear
    ]
    assert isinstance(found, QuantizedLinear)
    return whole_row_norms(found)


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def _copy_look_up(tokens: nn.Module, axis: TensorAxis) -> None:
    """Every rank updates its part of the sequence."""
    update = low_rank_of(tokens)
    assert update is not None
    distribute(update, axis, down=COPY, up=COPY)
    update.local_down = update.local_up = partial(local_weight, gradient=axis.stream_gradient)
    update.part = axis.part_of_sequence


def _divide_heads_update(head: nn.Module, axis: TensorAxis, vocab_size: int) -> None:
    """B is divided over the vocabulary; what A gives is gathered with the hidden states, by the loss."""
    update = low_rank_of(head)
    assert update is not None
    distribute(update, axis, down=COPY, up=COLUMN, magnitude=COLUMN)
    update.local_down = partial(local_weight, gradient=axis.stream_gradient)
    update.local_up = update.local_magnitude = update.local_base = local_weight
    update.whole_weight = partial(_rows_of_all, axis, vocab_size)


def _rows_of_all(axis: TensorAxis, count: int, rows: Tensor) -> Tensor:
    """Rows [part of count, columns] as this rank's part of a matrix."""
    shape = torch.Size((count, rows.shape[1]))
    stride = (rows.shape[1], 1)
    return DTensor.from_local(rows, axis.mesh, [COLUMN], run_check=False, shape=shape, stride=stride)


def _divide_update(linear: nn.Module, axis: TensorAxis) -> None:
    update, forward = low_rank_of(linear), linear.forward
    assert update is not None and isinstance(forward, partial) and isinstance(linear.weight, Tensor)
    inner: partial[Tensor] = forward.args[1]
    part = part_of(linear)
    if part is not None:
        _divide_quantized(linear, update, part, inner, axis)
        return
    share = partial(local_weight, gradient=Partial())
    placement = linear.weight.placements[0]  # type: ignore[attr-defined]
    if placement == COLUMN:
        distribute(update, axis, down=COPY, up=COLUMN, magnitude=COLUMN)
        update.local_down = share
        update.local_up = update.local_magnitude = update.local_base = local_weight
    elif placement == ROW:
        distribute(update, axis, down=ROW, up=COPY, magnitude=COPY)
        update.local_down = update.local_base = local_weight
        update.local_up = update.local_magnitude = share
        update.whole_squares = partial(all_reduce, group=axis.group)
        if inner.func is row_linear:  # it ends in a sum over ranks, and the update's share is part of that
            product = partial(_updated_product, linear, update, inner.args[2])
            assert isinstance(linear, nn.Linear)
            linear.forward = partial(row_linear, linear, axis, product)  # type: ignore[method-assign]
    else:
        distribute(update, axis, down=COPY, up=COPY, magnitude=COPY)
        update.local_down = share
        rows = inner.args[2] if inner.func is head_linear else slice(None)
        mine = partial(_rows_of_share, rows)
        update.local_up = update.local_magnitude = update.local_base = mine


def _divide_quantized(
    linear: nn.Module, update: LowRankUpdate, part: Part, inner: partial[Tensor], axis: TensorAxis
) -> None:
    """As :func:`_divide_update`, beside codes that are this rank's own part and no DTensor."""
    _make_whole(update, part)
    share = partial(local_weight, gradient=Partial())
    if part.is_by_inputs:
        distribute(update, axis, down=ROW, up=COPY, magnitude=COPY)
        update.local_down = local_weight
        update.local_up = update.local_magnitude = share
        update.whole_squares = partial(all_reduce, group=axis.group)
        if inner.func is row_quantized:
            plain = inner.args[2]
            updated = lambda inputs: update(inputs, plain, lambda: dense_weight(linear))  # noqa: E731
            linear.forward = partial(row_quantized, linear, axis, updated)  # type: ignore[method-assign]
        return
    is_whole = part.rows == slice(0, part.shape[0])
    if is_whole or inner.args[1] is not None:  # ranks share a head
        distribute(update, axis, down=COPY, up=COPY, magnitude=COPY)
        mine = partial(_rows_of_share, part.rows)
    else:
        distribute(update, axis, down=COPY, up=COLUMN, magnitude=COLUMN)
        mine = local_weight  # type: ignore[assignment]
    update.local_down = share
    update.local_up = update.local_magnitude = mine
    update.local_base = lambda base: mine(base) if isinstance(base, DTensor) else base


def _make_whole(update: LowRankUpdate, part: Part) -> None:
    """An update, on meta, that was made for a part of a matrix becomes one of all of it."""
    outputs, inputs = part.shape
    update.down = nn.Parameter(update.down.new_empty(len(update.down), inputs))
    update.up = nn.Parameter(update.up.new_empty(outputs, update.up.shape[1]))
    if update.magnitude is not None:
        update.magnitude = nn.Parameter(update.magnitude.new_empty(outputs))


def _rows_of_share(rows: slice, weight: Tensor) -> Tensor:
    return local_weight(weight, Partial())[rows]


def _updated_product(
    linear: nn.Module,
    update: LowRankUpdate,
    product: Product,
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Takes the place of the product of a linear layer whose inputs are split; it adds no bias."""
    assert bias is None

    def plain(rows: Tensor) -> Tensor:
        return product(rows, weight, None)

    return update(inputs, plain, lambda: linear.weight)


def _divide_prefix(prefix: nn.Module, heads: int, axis: TensorAxis) -> None:
    if heads % axis.size == 0:
        distribute(prefix, axis, key=COLUMN, value=COLUMN)
        prefix.local = local_weight  # type: ignore[assignment]
        return
    distribute(prefix, axis, key=COPY, value=COPY)
    mine = axis.rank * heads // axis.size
    prefix.local = partial(_rows_of_share, slice(mine, mine + 1))  # type: ignore[assignment]
