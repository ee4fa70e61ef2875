"""Dropout of what tensor-parallel ranks hold different parts of, where they share a random stream.

Without sequence parallelism all ranks hold the whole residual stream and must drop the same elements
of it, so their random streams run alike. Their heads are different ones and need other masks
(Megatron keeps a second generator for that). Here a number drawn from the common stream, together
with the rank, seeds the generator for the length of one call: no further state has to be kept over
activation recomputation, which restores the common stream, or in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mtnlg.model import DecoderLayer, MegatronLmDecoder
from mtnlg.parallel.mesh import Mesh


def separate_attention_dropout(decoder: MegatronLmDecoder, mesh: Mesh) -> None:
    """Let each tensor-parallel rank drop other attention weights; last to touch attention functions."""
    if mesh.tensor_size == 1 or mesh.layout.sequence_parallel or not decoder.config.attention_dropout:
        return  # with sequence parallelism ranks have random streams of their own anyway
    for layer in decoder.layers.values():
        assert isinstance(layer, DecoderLayer)
        for attention in layer.attentions:
            attention.attention_function = with_own_stream(attention.attention_function, mesh.tensor_rank)


def with_own_stream(function: Callable[..., Tensor], rank: int) -> Callable[..., Tensor]:
    """``function`` of attention, whose dropout differs from rank to rank; see :class:`Attention`.

    Args:
        function: attention of queries, keys, values, mask and share of weights dropped.
        rank: place among the ranks that share each matrix.
    """

    @torch.compiler.disable  # compiled code cannot change generators
    def apart(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        if dropout == 0.0:
            return function(query, key, value, mask, dropout)
        with own_stream(rank, query.device):
            return function(query, key, value, mask, dropout)

    return apart


@contextmanager
def own_stream(rank: int, device: torch.device) -> Iterator[None]:
    """While inside, random numbers on ``device`` are this rank's; afterwards the common stream goes on."""
    # Drawn on the CPU, whose stream all ranks share as well: reading it waits for no GPU.
    seed = int(torch.randint(2**62, (), device="cpu"))
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed + rank)
    try:
        yield
    finally:
        generator.set_state(state)
