"""Encoder-decoders laid out: what they need beside a decoder's layers, embedding and head.

Pipeline stages follow each other through the encoder and then through the decoder. They send three
tensors: what the encoder makes of the source (and after its end, its result, which every layer of the
decoder reads), what the decoder makes of the target (up to its first layer, the embedded tokens), and
the two tables of relative positions. So the first stage alone has the embedding and the tables, and no
weight but the tied head is in two places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Shard

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.config.division import layers_of_stages
from mtnlg.model import CrossDecoderLayer, EncoderLayer, MegatronEncoderDecoder
from mtnlg.model.encoder_decoder import DroppingMlp, reading_mask, writing_mask
from mtnlg.model.relative import RelativePositions, distance_buckets
from mtnlg.parallel.dropout import own_stream
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.stage import Stage
from mtnlg.parallel.tensor import copy_norm, distribute, local_weight


class PairStage(Stage):
    """An encoder-decoder, or one stage of it: takes and returns source and target.

    Args:
        model: the model or the part of it that this stage runs.
        number: of the stage in its pipeline.
        is_part: whether it is one of several stages.
        sequence_shards: parts that hidden states are split into over the sequence.
    """

    decoder: MegatronEncoderDecoder  # type: ignore[assignment]

    def __init__(
        self, model: MegatronEncoderDecoder, number: int, is_part: bool, sequence_shards: int = 1
    ) -> None:
        super().__init__(model, number, sequence_shards)  # type: ignore[arg-type]
        self.is_part = is_part
        if is_part:  # what stages send each other goes through the model's own call: FSDP waits for it
            _set_forward(model, partial(_run_stage, model, sequence_shards))

    def forward(  # type: ignore[override]
        self,
        source: Tensor,
        target: Tensor,
        tables: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run this stage.

        Args:
            source: token ids [batch, source], or the previous stage's hidden states
                [batch, source / shards, hidden].
            target: likewise of the target.
            tables: [buckets, 2 * heads] of relative positions, from the previous stage.
            labels: [batch, target]; used by the last stage only.
            encoder_mask: [batch, source], true where there is a token; ``None`` is everywhere.
            document_ids: [batch, source]; tokens see only their own document's.
            decoder_document_ids: [batch, target]; likewise, of what was written and read.

        Returns:
            The summed loss (float32 scalar) or logits on the last stage; before it what the next takes.
        """
        if self.is_part:
            documents = (document_ids, decoder_document_ids)
            found = self.decoder(source, target, tables, labels, encoder_mask, *documents)
            # What only passes through is a new tensor all the same: gradients go back through each stage.
            return found if isinstance(found, Tensor) else tuple(each.view_as(each) for each in found)
        output = self.decoder(
            source, target, labels, encoder_mask, None, document_ids, decoder_document_ids
        )
        found = output.logits if output.loss is None else output.loss
        assert found is not None
        return found


class ReceivedPositions(nn.Module):
    """Relative positions whose numbers the first stage sends with every micro-batch.

    Args:
        config: the architecture.
        looks_ahead: of an encoder, or of a decoder.
    """

    table: Tensor  # [buckets, heads]

    def __init__(self, config: MegatronModelConfig, looks_ahead: bool) -> None:
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.looks_ahead = looks_ahead

    def forward(self, distances: Tensor) -> Tensor:
        """[batch or 1, queries, keys] → [batch or 1, heads, queries, keys]"""
        buckets = distance_buckets(distances, self.num_buckets, self.max_distance, self.looks_ahead)
        return F.embedding(buckets, self.table).permute(0, 3, 1, 2)


def cut_pair_stage(
    model: MegatronEncoderDecoder, layout: LayoutConfig, number: int, sends_tables: bool = True
) -> None:
    """Leave in ``model`` only what the stage ``number`` runs; no parameter changes its name.

    Relative positions are sent by the first stage, whose they are, or every stage has the numbers.
    """
    config = model.config
    if layout.num_stages == 1:
        return
    mine = layers_of_stages(config, layout)[number]
    for index in range(config.total_layers):
        if index not in mine:
            del model.layers[str(index)]
    if number > 0:
        model.embedding = None
        if model.encoder_positions is not None and sends_tables:
            model.encoder_positions = ReceivedPositions(config, looks_ahead=True)  # type: ignore[assignment]
            model.decoder_positions = ReceivedPositions(config, looks_ahead=False)  # type: ignore[assignment]
    if config.num_hidden_layers - 1 not in mine:
        model.encoder_end = None
    if number < layout.num_stages - 1:
        model.head = None


def _run_stage(
    model: MegatronEncoderDecoder,
    shards: int,
    source: Tensor,
    target: Tensor,
    tables: Tensor | None,
    labels: Tensor | None,
    encoder_mask: Tensor | None,
    document_ids: Tensor | None,
    decoder_document_ids: Tensor | None,
) -> Tensor | tuple[Tensor, ...]:
    arrived = source.is_floating_point()
    lengths = [tensor.shape[1] * (shards if arrived else 1) for tensor in (source, target)]
    if encoder_mask is None:  # it also says how long the whole source is
        encoder_mask = torch.ones(1, lengths[0], dtype=torch.bool, device=source.device)
    tables = _tables(model, tables)
    source = model.encode(source, encoder_mask, document_ids)
    writing = writing_mask(lengths[1], lengths[1], target.device, None, decoder_document_ids)
    reading = reading_mask(encoder_mask, document_ids, decoder_document_ids)
    target = model.decode(target, source, reading, writing)
    if model.head is None:
        return (source, target) if tables is None else (source, target, tables)
    output = model.head(target, labels)
    return output.logits if output.loss is None else output.loss


def _tables(model: MegatronEncoderDecoder, received: Tensor | None) -> Tensor | None:
    """The positions' numbers [buckets, 2 * heads], looked up or received."""
    encoder, decoder = model.encoder_positions, model.decoder_positions
    if encoder is None or decoder is None:
        return None
    if received is None:
        rows = torch.arange(encoder.num_buckets, device=next(encoder.parameters()).device)
        return torch.cat([encoder.buckets(rows), decoder.buckets(rows)], dim=1)
    for positions, table in zip((encoder, decoder), received.chunk(2, dim=1)):
        assert isinstance(positions, ReceivedPositions)
        positions.table = table
    return received


def split_pair(model: MegatronEncoderDecoder, mesh: Mesh) -> None:
    """Divide over tensor-parallel ranks what a decoder has not, in place.

    Args:
        model: the model, or one stage of it.
        mesh: this rank's place.
    """
    if mesh.tensor_size == 1:
        return
    axis = TensorAxis(mesh.axis("tensor"), mesh.layout.sequence_parallel)
    for positions in model.modules():
        if isinstance(positions, RelativePositions):  # a number for each head
            distribute(positions.buckets, axis, weight=Shard(1))
            _set_forward(positions.buckets, partial(_look_up, positions.buckets))
    if model.encoder_end is not None:
        copy_norm(model.encoder_end.norm, axis, axis.stream_gradient)
    if any(isinstance(layer, CrossDecoderLayer) for layer in model.layers.values()):
        decode = partial(_with_whole_memory, axis, model.decode)
        model.decode = decode  # type: ignore[method-assign]


def _look_up(module: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, local_weight(module.weight))


def _with_whole_memory(
    axis: TensorAxis,
    decode: Callable[..., Tensor],
    inputs: Tensor,
    memory: Tensor | None,
    *args: Tensor | None,
) -> Tensor:
    """All layers read the encoder's result: it is gathered once, and its gradient summed once."""
    return decode(inputs, None if memory is None else axis.enter(memory), *args)


def separate_pair_dropout(model: MegatronEncoderDecoder, mesh: Mesh) -> None:
    """Let each tensor-parallel rank drop other columns of the MLPs; see :mod:`mtnlg.parallel.dropout`."""
    if mesh.tensor_size == 1 or mesh.layout.sequence_parallel or not model.config.hidden_dropout:
        return
    for layer in model.layers.values():
        assert isinstance(layer, EncoderLayer)
        assert isinstance(layer.mlp, DroppingMlp)
        dropout = layer.mlp.dropout
        _set_forward(dropout, partial(_drop_apart, dropout.forward, mesh.tensor_rank))


@torch.compiler.disable  # compiled code cannot change generators
def _drop_apart(dropout: Callable[[Tensor], Tensor], rank: int, hidden: Tensor) -> Tensor:
    with own_stream(rank, hidden.device):
        return dropout(hidden)


def _set_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    # The forward of the instance is replaced instead of the module: names stay.
    module.forward = function  # type: ignore[method-assign]
