"""The autoregressive Transformer decoder of GPT, Llama and their kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.model.attention import KeyValueCache
from mtnlg.model.layers import make_layer
from mtnlg.model.loss import softcapped, summed_cross_entropy
from mtnlg.model.norms import make_norm
from mtnlg.model.positions import Rotations

EVERY_DOCUMENT = -1  # the document number of a token that tokens of all documents see


@dataclass
class DecoderOutput:
    """What a decoder, or one pipeline stage of it, returns.

    Args:
        logits: [batch, sequence, vocab]; given when no labels were.
        loss: summed cross entropy (float32 scalar, nats); given when labels were.
        hidden: [batch, sequence, hidden]; given by a stage without a head.
    """

    logits: Tensor | None = None
    loss: Tensor | None = None
    hidden: Tensor | None = None


class Embedding(nn.Module):
    """Token embedding plus learned positions; scaled, projected and normalized where the config says so."""

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        width, hidden = config.embedding_width, config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.scale = config.embedding_scale
        self.projection = nn.Linear(width, hidden, bias=False) if width != hidden else None
        self.positions = None
        self.position_offset = config.position_offset
        if config.position_embedding == "learned":
            self.positions = nn.Embedding(config.max_position_embeddings + config.position_offset, hidden)
        self.norm = make_norm(config) if config.embedding_norm else None
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.require_grads = config.enable_input_require_grads

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[batch, sequence] and positions [batch or 1, sequence] → [batch, sequence, hidden]"""
        hidden = self.tokens(input_ids)
        if self.scale is not None:
            hidden = hidden * hidden.new_tensor(self.scale)  # rounded like the weights
        if self.projection is not None:
            hidden = self.projection(hidden)
        if self.positions is not None:
            hidden = hidden + self.positions(position_ids + self.position_offset)
        if self.norm is not None:
            hidden = self.norm(hidden)
        hidden = self.dropout(hidden)
        if self.require_grads and torch.is_grad_enabled() and not hidden.requires_grad:
            hidden.requires_grad_()
        return hidden


class Head(nn.Module):
    """Final norm and output projection, followed by the loss where labels are given.

    ``loss_function(hidden, weight, labels)`` is an attribute so that a layout can put its own in.
    """

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        width, hidden = config.embedding_width, config.hidden_size
        self.norm = make_norm(config) if config.norm_placement != "after" else nn.Identity()
        self.projection = nn.Linear(hidden, width, bias=False) if width != hidden else None
        self.output = nn.Linear(width, config.vocab_size, bias=False)
        self.softcap = config.logit_softcap
        self.loss_function: Callable[..., Tensor] = summed_cross_entropy

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """[batch, sequence, hidden] → logits [batch, sequence, vocab], or the summed loss."""
        hidden = self.norm(hidden)
        if self.projection is not None:
            hidden = self.projection(hidden)
        if labels is None:
            return DecoderOutput(logits=softcapped(self.output(hidden), self.softcap))
        capped = {} if self.softcap is None else {"softcap": self.softcap}
        return DecoderOutput(loss=self.loss_function(hidden, self.output.weight, labels, **capped))


class MegatronLmDecoder(nn.Module):
    """The whole decoder, or the part of it that is left after a stage has been cut out.

    ``embedding`` and ``head`` may be ``None`` and ``layers`` may hold any of the layers under their
    global numbers, so that cutting a pipeline stage renames no parameter.

    Args:
        config: the architecture.
    """

    embedding: Embedding | None
    head: Head | None
    adapter: AdapterConfig | None = None  # what mtnlg.model.adapters has put in

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleDict(
            {str(index): make_layer(config, index) for index in range(config.num_hidden_layers)}
        )
        self.head = Head(config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the token embedding's matrix, where the config says so.

        A head that was exchanged for another kind of module keeps the matrix that it was made from.
        """
        if not self.config.tie_word_embeddings or self.embedding is None or self.head is None:
            return
        if isinstance(self.head.output, nn.Linear):
            self.head.output.weight = self.embedding.tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        logits_at: Tensor | None = None,
    ) -> DecoderOutput:
        """Run the decoder.

        Args:
            input_ids: [batch, sequence]; hidden states [batch, sequence, hidden] without embedding.
            labels: [batch, sequence] next tokens, ``-100`` ignored; with them the summed loss is
                returned instead of logits.
            position_ids: [batch or 1, sequence]; ``None`` counts on from the cache's length.
            document_ids: [batch, sequence]; tokens see only their own document's, and those of
                document -1, which is everyone's.
            attention_mask: [batch, 1, sequence, keys], true where a query may see a key; overrides
                the causal and the document mask.
            cache: keys and values of earlier tokens.
            logits_at: [batch], the only column of each row whose logits are wanted (generation needs
                just the last); the result is then [batch, 1, vocab].
        """
        start = cache.length if cache is not None else 0
        sequence = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(start, start + sequence, device=input_ids.device)[None]
        hidden = input_ids if self.embedding is None else self.embedding(input_ids, position_ids)
        rotations = Rotations(self.config, position_ids, hidden.dtype)
        mask = attention_mask
        if mask is None:
            mask = _causal_mask(sequence, start, document_ids, input_ids.device)
        for index, layer in self.layers.items():
            hidden = layer(hidden, rotations.of_layer(int(index)), mask, cache)
        if self.head is None:
            return DecoderOutput(hidden=hidden)
        if logits_at is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), logits_at][:, None]
        return self.head(hidden, labels)


def _causal_mask(
    sequence: int, start: int, document_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """[batch or 1, 1, sequence, keys], or ``None`` where plain causal attention says the same."""
    if document_ids is not None:
        same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
        same |= (document_ids == EVERY_DOCUMENT)[:, None, None, :]
        return same.tril()  # not by ``sequence``, which is only a part under sequence parallelism
    if start == 0 or sequence == 1:
        return None
    ones = torch.ones(sequence, start + sequence, dtype=torch.bool, device=device)
    return ones.tril(diagonal=start)[None, None]
