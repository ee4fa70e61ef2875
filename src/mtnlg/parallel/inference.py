"""A layout for generation: each rank's share of the model as plain modules of smaller shapes.

The model is divided by the code that divides it for training. Nothing is trained here, so afterwards
the DTensors are replaced by what this rank holds of them, and forwards that care for gradients by the
modules' own. What is left of the layout is one sum over the tensor-parallel ranks after each attention,
each MLP and the embedding. A rank's heads, and so its keys and values, are those of its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config import CheckpointError, LayoutConfig, MegatronModelConfig
from mtnlg.config.layout_rules import layout_problems
from mtnlg.model import DecoderLayer, MegatronEncoderDecoder, MegatronLmDecoder, MixtureOfExperts
from mtnlg.model.attention import Attention
from mtnlg.model.moe import grouped_product
from mtnlg.model.router import router_logits
from mtnlg.parallel.encoder_decoder import cut_pair_stage, split_pair
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.expert import divide_experts, kernel_product
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.pipeline import check_division, cut_stage
from mtnlg.parallel.stage import Stage
from mtnlg.parallel.tensor import split_matrices
from mtnlg.parallel.vocabulary import look_up_tokens
from mtnlg.parallel.weights import TIED_COPY, TIED_ORIGINAL, local_slice

# What a rank wants of a parameter: a view of it.
Cut = Callable[[str, Tensor], Tensor]
# Names → what ``Cut`` leaves of their tensors, one after the other, on the CPU; nothing else is read.
ReadWeights = Callable[[Collection[str], Cut], Iterable[tuple[str, Tensor]]]


def inference_layout(tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1) -> LayoutConfig:
    """The layout that generation uses: one replica, activations whole on every rank.

    Raises:
        ConfigError: a size is out of range.
    """
    return LayoutConfig(
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=1,
        sequence_parallel=False,
    )


def inference_problems(layout: LayoutConfig, config: MegatronModelConfig) -> list[str]:
    """Why ``config`` cannot be divided by ``layout``; empty when it can."""
    problems = layout_problems(
        layout, config, sequence_length=1, micro_batches=layout.pipeline_parallel_size
    )
    return [problem.replace("layout.", "") for problem in problems]


def lay_out_for_inference(
    config: MegatronModelConfig, mesh: Mesh, read: ReadWeights, dtype: torch.dtype | None = None
) -> MegatronLmDecoder:
    """This rank's stage of the model with its weights, ready to run; every rank calls this.

    Of each parameter only this rank's part is read, one after the other: the peak is this rank's share.

    Args:
        config: the architecture.
        mesh: this rank's place, of an :func:`inference_layout`.
        read: gives the weights.
        dtype: of the weights; ``None`` is that of those read.

    Raises:
        CheckpointError: weights are missing or have other shapes.
    """
    decoder = _cut(config, mesh)
    split_matrices(decoder, mesh)
    divide_experts(decoder, mesh)
    if isinstance(decoder, MegatronEncoderDecoder):
        split_pair(decoder, mesh)
    check_division([Stage(decoder, mesh.pipeline_rank)], config, mesh)
    _fill(decoder, config, mesh, read, dtype)
    _forget_layout(decoder, mesh)
    for parameter in decoder.parameters():
        parameter.requires_grad_(False)
    return decoder.eval()


def _cut(config: MegatronModelConfig, mesh: Mesh) -> MegatronLmDecoder:
    """What this rank's stage runs, without memory."""
    with torch.device("meta"):
        if not config.has_encoder:
            decoder = MegatronLmDecoder(config)
            cut_stage(decoder, mesh.layout, mesh.pipeline_rank)
            return decoder
        pair = MegatronEncoderDecoder(config)
    cut_pair_stage(pair, mesh.layout, mesh.pipeline_rank, sends_tables=False)
    return cast(MegatronLmDecoder, pair)


def _fill(
    decoder: MegatronLmDecoder,
    config: MegatronModelConfig,
    mesh: Mesh,
    read: ReadWeights,
    dtype: torch.dtype | None,
) -> None:
    """Put this rank's parts of the weights into ``decoder`` as plain tensors of their own."""
    places = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    if config.tie_word_embeddings and TIED_COPY in places:  # a last stage that is not the first
        places[TIED_ORIGINAL] = places.pop(TIED_COPY)

    def cut(name: str, whole: Tensor) -> Tensor:
        if whole.shape != places[name].shape:
            raise CheckpointError(
                f"{name} has the shape {list(whole.shape)}, the model's is {list(places[name].shape)}."
            )
        return local_slice(whole, places[name])

    missing = set(places)
    for name, part in read(frozenset(places), cut):
        part = part.to(mesh.device, dtype)
        missing.discard(name)
        is_copy = name == TIED_ORIGINAL and decoder.embedding is None
        _replace(decoder, TIED_COPY if is_copy else name, part)
    if missing:
        raise CheckpointError(f"weights are missing: {', '.join(sorted(missing)[:6])}.")
    decoder.tie_weights()


def _replace(decoder: MegatronLmDecoder, name: str, part: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = decoder.get_submodule(path)
    if last in module._buffers:
        module.register_buffer(last, part)
    else:
        module.register_parameter(last, nn.Parameter(part, requires_grad=False))


def _forget_layout(decoder: MegatronLmDecoder, mesh: Mesh) -> None:
    """Give modules their own forwards back, and those that end in a sum over ranks such a one."""
    if mesh.tensor_size == 1:
        return
    axis = TensorAxis(mesh.axis("tensor"), splits_sequence=False)
    group = mesh.axis("tensor").get_group()
    decoder.__dict__.pop("decode", None)
    for module in decoder.modules():
        module.__dict__.pop("forward", None)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    if decoder.embedding is not None:
        tokens = decoder.embedding.tokens
        tokens.forward = partial(_look_up, tokens, axis, group)  # type: ignore[method-assign]
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        for attention in layer.attentions:
            _own_heads(attention, decoder.config, axis)
            _sum_after(attention.output, group)
        if isinstance(layer.mlp, MixtureOfExperts):
            _sum_of_experts(layer.mlp, group, mesh.device.type)
        else:
            _sum_after(layer.mlp.down, group)


def _own_heads(attention: Attention, config: MegatronModelConfig, axis: TensorAxis) -> None:
    """Where ranks outnumber the key and value heads, keep the one that this rank's queries look at."""
    heads, size = config.key_value_heads, config.head_size
    if heads % axis.size == 0:
        return
    first = axis.rank * heads // axis.size * size
    for projection in (attention.key, attention.value):
        for name, weight in list(projection.named_parameters()):
            mine = weight.detach()[first : first + size].clone()
            projection.register_parameter(name, nn.Parameter(mine, requires_grad=False))
        projection.out_features = size


def _sum_after(linear: nn.Linear, group: dist.ProcessGroup) -> None:
    linear.forward = partial(summed_linear, linear, group)  # type: ignore[method-assign]


def summed_linear(linear: nn.Linear, group: dist.ProcessGroup, inputs: Tensor) -> Tensor:
    """A linear layer whose inputs are divided over the ranks of ``group``: products, sum, bias."""
    output = F.linear(inputs, linear.weight)
    dist.all_reduce(output, group=group)
    return output if linear.bias is None else output + linear.bias


def _look_up(tokens: nn.Embedding, axis: TensorAxis, group: dist.ProcessGroup, token_ids: Tensor) -> Tensor:
    found = look_up_tokens(token_ids, tokens.weight, axis, tokens.num_embeddings)
    dist.all_reduce(found, group=group)
    return found


def _sum_of_experts(block: MixtureOfExperts, group: dist.ProcessGroup, device_type: str) -> None:
    """Every rank routes alike and computes its columns of all experts."""
    block.router.logits_function = router_logits
    block.experts.grouped_product = kernel_product if device_type == "cuda" else grouped_product
    forward = block.forward  # of the class: the layout's was dropped

    def summed(hidden: Tensor) -> Tensor:
        output = forward(hidden)
        dist.all_reduce(output, group=group)
        return output

    block.forward = summed  # type: ignore[method-assign]


def local_heads(decoder: MegatronLmDecoder) -> int:
    """Key and value heads that this rank's layers compute."""
    config = decoder.config
    layer = next(iter(decoder.layers.values()), None)
    if layer is None:  # a stage of the embedding or the head alone
        return config.key_value_heads
    assert isinstance(layer, DecoderLayer)
    return layer.attention.key.weight.shape[0] // config.head_size
