"""What one training or evaluation step reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

IGNORED_LABEL = -100


@dataclass
class Batch:
    """Token ids and what is to be predicted at each of them.

    An encoder-decoder reads ``input_ids`` with its encoder, and ``decoder_input_ids`` with its decoder.

    Args:
        input_ids: [batch, sequence].
        labels: [batch, sequence], the token after each input token; -100 where nothing is scored. Of an
            encoder-decoder [batch, target].
        position_ids: [batch, sequence], position inside the document; only when positions start anew
            at document boundaries.
        document_ids: [batch, sequence], number of the document inside the sample; a token attends to
            its own document only. Given together with ``position_ids``.
        decoder_input_ids: [batch, target], for encoder-decoders: the labels, one place later.
        decoder_document_ids: [batch, target], of encoder-decoders: a token sees what was written and
            read of its own document only. Given together with ``document_ids`` [batch, sequence].
        encoder_mask: [batch, sequence], true where an encoder's input is a token and no padding;
            ``None`` is everywhere.
        prefix_lengths: [batch], for decoders: so many tokens at the beginning see each other.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    decoder_input_ids: torch.Tensor | None = None
    decoder_document_ids: torch.Tensor | None = None
    encoder_mask: torch.Tensor | None = None
    prefix_lengths: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice) -> Batch:
        """The samples of a slice, as views: micro-batches of a batch."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    @property
    def num_valid_tokens(self) -> int:
        """Labels that count in the loss."""
        return int((self.labels != IGNORED_LABEL).sum())

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: function(tensor) for name, tensor in given.items() if tensor is not None})
