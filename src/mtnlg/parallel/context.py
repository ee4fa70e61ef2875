"""Context parallelism: ranks that share each sequence.

Every layer but attention treats tokens one by one, so each rank simply runs its part of the sequence.
Labels are shifted before the sequence is cut, positions are written out, and attention is replaced by
one that reaches the other ranks' keys. Ranks of one sequence hold the same weights; their gradients are
added like those of replicas (:data:`mtnlg.parallel.mesh.WEIGHT_AXES`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.parallel.all_to_all_attention import AllToAllAttention
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.ring_attention import Ring, RingAttention, chunks_of_rank
from mtnlg.tokens.batch import Batch


def share_context(decoder: MegatronLmDecoder, mesh: Mesh) -> None:
    """Give every layer the attention over parts of a sequence, in place.

    It takes the numbers of the documents of the whole sequence where plain attention takes a mask.
    """
    if mesh.context_size == 1:
        return
    group = mesh.axis("context").get_group()
    function: RingAttention | AllToAllAttention = RingAttention(Ring(group))
    if mesh.layout.context_parallel_method == "all_to_all":
        function = AllToAllAttention(group)
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        layer.attention.attention_function = function


def part_of_sequence(batch: Batch, mesh: Mesh) -> Batch:
    """This rank's part of every sample: two chunks for ring attention, one stretch for all-to-all.

    Positions are written out. The numbers of the documents stay those of the whole sequence: they are
    small, and attention needs them for other ranks' keys.

    Args:
        batch: whole samples, the same on all ranks that share them.
        mesh: this rank's place.
    """
    if mesh.context_size == 1:
        return batch
    positions = batch.position_ids
    if positions is None:
        rows, length = batch.input_ids.shape
        positions = torch.arange(length, device=batch.input_ids.device).expand(rows, -1)
    return Batch(
        _part(batch.input_ids, mesh), _part(batch.labels, mesh), _part(positions, mesh), batch.document_ids
    )


def _part(tensor: Tensor, mesh: Mesh) -> Tensor:
    """[batch, sequence] → [batch, sequence / ranks]"""
    size, rank = mesh.context_size, mesh.context_rank
    if mesh.layout.context_parallel_method == "all_to_all":
        return tensor.chunk(size, dim=1)[rank].contiguous()
    chunks = tensor.chunk(2 * size, dim=1)
    return torch.cat([chunks[number] for number in chunks_of_rank(rank, size)], dim=1)
