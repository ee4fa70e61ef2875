"""One stage of the model, as a module that takes and returns plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtnlg.model import MegatronLmDecoder

PREFIX = "decoder."


class Stage(nn.Module):
    """A decoder, or one stage of it, whose output is a tensor: what FSDP and the pipeline hook into.

    Args:
        decoder: the model or the part of it that this stage runs.
        number: of the stage in its pipeline.
        sequence_shards: parts that arriving hidden states are split into over the sequence (sequence
            parallelism on stages after the first), so that positions cover the whole sequence.
        shares_context: whether other ranks hold other parts of each sequence; attention then takes the
            documents of the whole sequence in place of a mask (:mod:`mtnlg.parallel.context`).
    """

    def __init__(
        self,
        decoder: MegatronLmDecoder,
        number: int = 0,
        sequence_shards: int = 1,
        shares_context: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.number = number
        self.sequence_shards = 1 if decoder.embedding is not None else sequence_shards
        self.shares_context = shares_context

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            inputs: token ids [batch, sequence], or the previous stage's hidden states
                [batch, sequence / shards, hidden].
            labels: [batch, sequence]; used by the last stage only.
            position_ids: [batch, sequence] or ``None``.
            document_ids: [batch, sequence] or ``None``; of the whole sequence where ranks share it.
            prefix_lengths: [batch] or ``None``; so many tokens at the beginning see each other.

        Returns:
            The summed loss (float32 scalar) or logits on the last stage, hidden states before it.
        """
        length = inputs.shape[1] * self.sequence_shards
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs.device)[None]
        mask = None if prefix_lengths is None else prefix_mask(prefix_lengths, length)
        if self.shares_context:
            mask, document_ids = document_ids, None
        output = self.decoder(inputs, labels, position_ids, document_ids, mask)
        for value in (output.loss, output.logits, output.hidden):
            if value is not None:
                return value
        raise AssertionError("a decoder returns a loss, logits or hidden states")


def prefix_mask(prefix_lengths: Tensor, sequence: int) -> Tensor:
    """Who sees whom where texts begin with a part that is read at once: [batch, 1, sequence, sequence].

    Args:
        prefix_lengths: [batch].
        sequence: tokens.
    """
    places = torch.arange(sequence, device=prefix_lengths.device)
    past = places <= places[:, None]
    return (past | (places < prefix_lengths[:, None, None]))[:, None]
