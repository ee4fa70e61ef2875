"""Tensor and sequence parallelism: how each layer's matrices are divided, and computed with.

Queries, keys, values and the MLP's first matrices are split by output (heads, ffn columns), the two
projections back into the residual stream by input, so that a block needs one exchange before and one
after it (:mod:`mtnlg.parallel.exchange`). The embedding and the head are split over the vocabulary,
which need not divide. Where ranks outnumber the key and value heads, every rank holds those two
matrices whole, computes the one head that its queries look at, and the gradients are summed.

Every weight is a DTensor of the plain model's shape, which is what FSDP, the optimizer and
checkpoints work with; modules compute with what this rank holds of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.model.attention import Attention
from mtnlg.model.attention_scores import ScoredAttention
from mtnlg.model.decoder import Embedding, Head
from mtnlg.model.mlp import Mlp
from mtnlg.model.norms import RMSNorm1p, rms_norm_1p
from mtnlg.parallel.async_tensor import linear_then_bias
from mtnlg.parallel.cpu_linear import onednn_linear
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.remake import result_of
from mtnlg.parallel.vocabulary import VocabularyParallelLoss, gather_logits, look_up_tokens

COLUMN, ROW, COPY = Shard(0), Shard(1), Replicate()
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def split_matrices(
    decoder: MegatronLmDecoder,
    mesh: Mesh,
    sends_while_multiplying: bool = False,
    layer_product: Product | None = None,
) -> None:
    """Divide ``decoder`` over the tensor-parallel ranks, in place.

    Args:
        decoder: the model, or one stage of it.
        mesh: this rank's place.
        sends_while_multiplying: whether asynchronous tensor parallelism is on.
        layer_product: what linear layers of the blocks multiply with instead of the device's best.
    """
    if mesh.tensor_size == 1:
        return
    axis = TensorAxis(mesh.axis("tensor"), mesh.layout.sequence_parallel)
    product: Product = onednn_linear if mesh.device.type == "cpu" else F.linear
    if sends_while_multiplying:
        product = linear_then_bias
    if decoder.embedding is not None:
        _split_embedding(decoder.embedding, axis)
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        for norm in layer.stream_norms:
            copy_norm(norm, axis, axis.stream_gradient)
        for attention in layer.attentions:
            split_attention(attention, decoder.config, axis, layer_product or product)
        if isinstance(layer.mlp, Mlp):
            split_mlp(layer.mlp, axis, layer_product or product)
    if decoder.head is not None:
        _split_head(decoder.head, axis, product, gathers=not decoder.config.parallel_output)
    decoder.tie_weights()  # each user of a tied matrix got its own


def distribute(module: nn.Module, axis: TensorAxis, **placements: Placement) -> None:
    """Make the named parameters of ``module``, where it has them, DTensors on ``axis``."""
    for name, placement in placements.items():
        weight = getattr(module, name, None)
        if weight is not None:
            divided = distribute_tensor(weight, axis.mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(divided, requires_grad=weight.requires_grad))


def local_weight(weight: Tensor, gradient: Placement | None = None) -> Tensor:
    """What this rank holds of ``weight``.

    Args:
        weight: a DTensor.
        gradient: what the gradient that arrives here is of the weight's; ``None`` is the same part.
            ``Partial()``: a share of the sum over ranks, which is formed once after the last
            micro-batch.
    """
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=None if gradient is None else [gradient])


def copy_norm(norm: nn.Module, axis: TensorAxis, gradient: Placement) -> None:
    """Give every rank the whole weights of ``norm``, whose gradients arrive as ``gradient``."""
    if isinstance(norm, nn.Identity):
        return
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    distribute(norm, axis, weight=COPY, bias=COPY)
    _set_forward(norm, _norm, norm, gradient)


def split_attention(
    attention: Attention, config: MegatronModelConfig, axis: TensorAxis, product: Product
) -> None:
    """Divide the heads."""
    distribute(attention.query, axis, weight=COLUMN, bias=COLUMN)
    _set_forward(attention.query, _column_linear, attention.query, product)
    heads = config.key_value_heads
    for projection in (attention.key, attention.value):
        if heads % axis.size == 0:
            distribute(projection, axis, weight=COLUMN, bias=COLUMN)
            _set_forward(projection, _column_linear, projection, product)
        else:
            distribute(projection, axis, weight=COPY, bias=COPY)
            first = axis.rank * heads // axis.size * config.head_size
            rows = slice(first, first + config.head_size)
            _set_forward(projection, head_linear, projection, product, rows)
    distribute(attention.output, axis, weight=ROW, bias=COPY)
    _set_forward(attention.output, row_linear, attention.output, axis, product)
    if isinstance(attention.attention_function, ScoredAttention):
        count = config.num_attention_heads // axis.size
        mine = slice(axis.rank * count, (axis.rank + 1) * count)
        attention.attention_function = attention.attention_function.of_heads(mine)
    for norm in (attention.query_norm, attention.key_norm):
        if norm is not None:
            copy_norm(norm, axis, Partial())  # applied to other heads on each rank
    _set_forward(attention, _on_whole_sequence, axis, attention.forward)


def split_mlp(mlp: Mlp, axis: TensorAxis, product: Product) -> None:
    """Divide the columns of the first matrices and the rows of the last."""
    for linear in (mlp.gate, mlp.up):
        if linear is not None:
            distribute(linear, axis, weight=COLUMN, bias=COLUMN)
            _set_forward(linear, _column_linear, linear, product)
    distribute(mlp.down, axis, weight=ROW, bias=COPY)
    _set_forward(mlp.down, row_linear, mlp.down, axis, product)
    _set_forward(mlp, _on_whole_sequence, axis, mlp.forward)


def _split_embedding(embedding: Embedding, axis: TensorAxis) -> None:
    distribute(embedding.tokens, axis, weight=COLUMN)
    _set_forward(embedding.tokens, _tokens, embedding.tokens, axis)
    if embedding.positions is not None:
        distribute(embedding.positions, axis, weight=COPY)
        _set_forward(embedding.positions, _positions, embedding.positions, axis)
    if embedding.norm is not None:
        copy_norm(embedding.norm, axis, axis.stream_gradient)
    if embedding.projection is not None:
        _copy_projection(embedding.projection, axis)


def _split_head(head: Head, axis: TensorAxis, product: Product, gathers: bool) -> None:
    copy_norm(head.norm, axis, axis.stream_gradient)
    if head.projection is not None:
        _copy_projection(head.projection, axis)
    distribute(head.output, axis, weight=COLUMN)
    _set_forward(head.output, _logits, head.output, axis, product, gathers)
    head.loss_function = VocabularyParallelLoss(axis, gathers, product)


def _copy_projection(projection: nn.Linear, axis: TensorAxis) -> None:
    """Let every rank project its part of the residual stream, or all of it where it has it whole."""
    distribute(projection, axis, weight=COPY)
    _set_forward(projection, _copied_linear, projection, axis.stream_gradient)


def _set_forward(module: nn.Module, function: Callable[..., Tensor], *args: Any) -> None:
    # The forward of the instance is replaced instead of the module: names stay.
    module.forward = partial(function, *args)  # type: ignore[method-assign]


def _on_whole_sequence(
    axis: TensorAxis, forward: Callable[..., Tensor], hidden: Tensor, *args: Any
) -> Tensor:
    # Gathered again, where the norm's result is not kept for the backward pass.
    return forward(result_of("normalization", axis.enter, hidden), *args)


def _column_linear(module: nn.Linear, product: Product, inputs: Tensor) -> Tensor:
    bias = None if module.bias is None else local_weight(module.bias)
    return product(inputs, local_weight(module.weight), bias)


def _copied_linear(module: nn.Linear, gradient: Placement, inputs: Tensor) -> Tensor:
    return F.linear(inputs, local_weight(module.weight, gradient))


def head_linear(module: nn.Linear, product: Product, rows: slice, inputs: Tensor) -> Tensor:
    """Some rows of a matrix that every rank holds whole."""
    bias = None if module.bias is None else local_weight(module.bias, Partial())[rows]
    return product(inputs, local_weight(module.weight, Partial())[rows], bias)


def row_linear(module: nn.Linear, axis: TensorAxis, product: Product, inputs: Tensor) -> Tensor:
    """A matrix divided by its inputs: each rank's share, their sum, the bias once."""
    output = axis.leave(product(inputs, local_weight(module.weight), None))
    if module.bias is None:
        return output
    return output + local_weight(module.bias, axis.stream_gradient)  # once, after the sum


def _norm(module: nn.LayerNorm | nn.RMSNorm, gradient: Placement, hidden: Tensor) -> Tensor:
    weight = local_weight(module.weight, gradient)
    if isinstance(module, RMSNorm1p):
        return rms_norm_1p(hidden, module.normalized_shape, weight, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(hidden, module.normalized_shape, weight, module.eps)
    bias = None if module.bias is None else local_weight(module.bias, gradient)
    return F.layer_norm(hidden, module.normalized_shape, weight, bias, module.eps)


def _tokens(module: nn.Embedding, axis: TensorAxis, token_ids: Tensor) -> Tensor:
    shard = local_weight(module.weight)
    return axis.leave(look_up_tokens(token_ids, shard, axis, module.num_embeddings))


def _positions(module: nn.Embedding, axis: TensorAxis, position_ids: Tensor) -> Tensor:
    weight = local_weight(module.weight, axis.stream_gradient)
    return F.embedding(axis.part_of_sequence(position_ids), weight)


def _logits(module: nn.Linear, axis: TensorAxis, product: Product, gathers: bool, hidden: Tensor) -> Tensor:
    logits = product(axis.enter(hidden), local_weight(module.weight), None)
    return gather_logits(logits, axis, module.out_features) if gathers else logits
