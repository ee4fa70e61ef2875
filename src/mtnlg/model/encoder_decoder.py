"""The encoder-decoder Transformer of T5, T5 v1.1, mT5, UMT5 and UL2 (pre-LN, relative positions)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from mtnlg.config import MegatronModelConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.model.attention import Attention, KeyValueCache
from mtnlg.model.decoder import DecoderOutput, Embedding, Head
from mtnlg.model.layers import DecoderLayer
from mtnlg.model.loss import IGNORED_LABEL
from mtnlg.model.mlp import Mlp
from mtnlg.model.norms import make_norm
from mtnlg.model.positions import Rotation
from mtnlg.model.relative import RelativePositions, add_mask, distances_between, unscaled_dot_product


class MemoryCache(KeyValueCache, Protocol):
    """A cache that also keeps what cross attention makes of the encoder's output, for it never changes."""

    def memory(self, layer_index: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, key_value_heads, source, head_dim] of a layer, made at the first call."""


class CrossAttention(Attention):
    """Attention of the decoder's queries to the encoder's output."""

    def attend(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden], memory [batch, source, hidden] → [batch, sequence, heads * head_dim]

        ``mask`` [batch, 1, sequence or 1, source] is true where a query may see a key; ``None`` is all.
        """

        def make() -> tuple[Tensor, Tensor]:
            assert memory is not None
            return self.keys_and_values(memory)

        query = self._split_heads(self.query(hidden))
        keeps = getattr(cache, "memory", None)
        key, value = make() if keeps is None else keeps(self.layer_index, make)
        dropout = self.attention_dropout if self.training else 0.0
        return self.attention_function(query, key, value, mask, dropout).transpose(1, 2).flatten(2)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, source, hidden] → two of [batch, key_value_heads, source, head_dim]"""
        return self._split_heads(self.key(memory)), self._split_heads(self.value(memory))

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]"""
        return self.output(self.attend(hidden, rotation, mask, cache, memory))


class DroppingMlp(Mlp):
    """An MLP that also drops what its activation gives, as T5's does."""

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def activate(self, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """act(up), or act(gate) · up, thinned out: [batch, sequence, ffn] → [batch, sequence, ffn]"""
        return self.dropout(super().activate(up, gate))


class EncoderLayer(DecoderLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)); what is seen is said by the mask alone.

    Args:
        config: the architecture.
        layer_index: among all layers, those of the encoder first.
    """

    def __init__(self, config: MegatronModelConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.attention.attention_function = unscaled_dot_product
        self.mlp = DroppingMlp(config)
        self.positions: RelativePositions | None = None
        if config.relative_attention_per_layer:
            self.positions = RelativePositions(config, layer_index < config.num_hidden_layers)

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        distances: Tensor | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden] → [batch, sequence, hidden]

        ``mask`` holds what is added to the products; where layers have positions of their own, it is
        true where a query may see a key, and ``distances`` [batch or 1, sequence, keys] are wanted.
        """
        return super().forward(hidden, rotation, self.with_positions(mask, distances), cache)

    def with_positions(self, mask: Tensor | None, distances: Tensor | None) -> Tensor | None:
        """The mask with this layer's own positions, where it has them."""
        if self.positions is None:
            return mask
        assert distances is not None
        return add_mask(self.positions(distances), mask)


class CrossDecoderLayer(EncoderLayer):
    """A decoder's layer: attention to what was written, then to what was read, then the MLP."""

    def __init__(self, config: MegatronModelConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.cross_norm = make_norm(config)
        self.cross_attention = CrossAttention(config, layer_index)
        self.cross_attention.attention_function = unscaled_dot_product

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        distances: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
    ) -> Tensor:
        """[batch, sequence, hidden], memory [batch, source, hidden] → [batch, sequence, hidden]"""
        mask = self.with_positions(mask, distances)
        attended = self.attention(self.attention_norm(hidden), rotation, mask, cache)
        hidden = hidden + self.dropout(attended)
        read = self.cross_attention(self.cross_norm(hidden), None, memory_mask, cache, memory)
        hidden = hidden + self.dropout(read)
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))

    @property
    def attentions(self) -> list[Attention]:
        """Every attention of the layer."""
        return [self.attention, self.cross_attention]

    @property
    def stream_norms(self) -> list[nn.Module]:
        """The norms that work on the residual stream."""
        return [*super().stream_norms, self.cross_norm]


class ScaledHead(Head):
    """Final norm, times ``1 / sqrt(hidden)`` where the config says so, and the output projection."""

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.scale = config.hidden_size**-0.5 if config.scales_output else None

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> DecoderOutput:
        """[batch, sequence, hidden] → logits [batch, sequence, vocab], or the summed loss."""
        hidden = self.dropout(self.norm(hidden))
        if self.scale is not None:
            hidden = hidden * self.scale
        if labels is None:
            return DecoderOutput(logits=self.output(hidden))
        return DecoderOutput(loss=self.loss_function(hidden, self.output.weight, labels))


class EncoderEnd(nn.Module):
    """What follows the encoder's last layer: its norm, and dropout."""

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, source, hidden] → [batch, source, hidden]"""
        return self.dropout(self.norm(hidden))


class MegatronEncoderDecoder(nn.Module):
    """The whole encoder-decoder, or the part of it that is left after a stage has been cut out.

    ``layers`` holds the encoder's layers under the numbers from 0 and the decoder's under those that
    follow. Both ends, the encoder's end and the positions may be ``None``: a stage keeps what it needs
    (``encoder_positions`` where it has layers of the encoder, ``decoder_positions`` likewise, the
    embedding where either begins), and no parameter is renamed.

    Args:
        config: the architecture.
    """

    adapter: AdapterConfig | None = None  # what mtnlg.model.adapters has put in
    embedding: Embedding | None
    encoder_positions: RelativePositions | None
    decoder_positions: RelativePositions | None
    encoder_end: EncoderEnd | None
    head: Head | None

    def __init__(self, config: MegatronModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.encoder_positions = self.decoder_positions = None
        if not config.relative_attention_per_layer:
            self.encoder_positions = RelativePositions(config, looks_ahead=True)
            self.decoder_positions = RelativePositions(config, looks_ahead=False)
        kinds = [EncoderLayer] * config.num_hidden_layers + [CrossDecoderLayer] * config.decoder_layers
        self.layers = nn.ModuleDict({str(index): kind(config, index) for index, kind in enumerate(kinds)})
        self.encoder_end = EncoderEnd(config)
        self.head = ScaledHead(config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the token embedding's matrix, where the config says so."""
        if not self.config.tie_word_embeddings or self.embedding is None or self.head is None:
            return
        if isinstance(self.head.output, nn.Linear):  # and not exchanged for another kind of module
            self.head.output.weight = self.embedding.tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        decoder_document_ids: Tensor | None = None,
    ) -> DecoderOutput:
        """Read ``input_ids`` and predict what the decoder writes.

        Args:
            input_ids: [batch, source] what the encoder reads.
            decoder_input_ids: [batch, target] what the decoder has written; ``None`` is ``labels`` one
                place later, after the token that a decoder starts with.
            labels: [batch, target] next tokens, ``-100`` ignored; with them the summed loss is returned
                instead of logits [batch, target, vocab].
            attention_mask: [batch, source], nonzero where there is a token and not padding.
            decoder_attention_mask: [batch, target], likewise.
            document_ids: [batch, source]; tokens see only their own document's.
            decoder_document_ids: [batch, target]; a document's target sees only its own source.
        """
        if decoder_input_ids is None:
            assert labels is not None, "give decoder_input_ids or labels"
            decoder_input_ids = self.shift_right(labels, decoder_document_ids)
        memory = self.encode(input_ids, attention_mask, document_ids)
        hidden = self.decode(
            decoder_input_ids,
            memory,
            reading_mask(attention_mask, document_ids, decoder_document_ids),
            writing_mask(
                decoder_input_ids.shape[1],
                decoder_input_ids.shape[1],
                decoder_input_ids.device,
                decoder_attention_mask,
                decoder_document_ids,
            ),
        )
        return DecoderOutput(hidden=hidden) if self.head is None else self.head(hidden, labels)

    def encode(
        self, inputs: Tensor, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
    ) -> Tensor:
        """Run the layers of the encoder that are here.

        Args:
            inputs: token ids [batch, source], or hidden states [batch, source, hidden] of earlier layers.
            attention_mask: [batch, source], nonzero where there is a token.
            document_ids: [batch, source].

        Returns:
            [batch, source, hidden], normalized where the encoder's end is here.
        """
        hidden = self._embed(inputs)
        size = attention_mask.shape[1] if attention_mask is not None else inputs.shape[1]
        mask = reading_mask(attention_mask, document_ids, document_ids)
        distances = distances_between(size, size, hidden.device)
        if self.encoder_positions is not None:
            mask = add_mask(self.encoder_positions(distances), mask)
        for index, layer in self.layers.items():
            if int(index) < self.config.num_hidden_layers:
                hidden = layer(hidden, None, mask, None, distances)
        return hidden if self.encoder_end is None else self.encoder_end(hidden)

    def decode(
        self,
        inputs: Tensor,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        mask: Tensor | None = None,
        cache: MemoryCache | None = None,
        distances: Tensor | None = None,
    ) -> Tensor:
        """Run the layers of the decoder that are here.

        Args:
            inputs: token ids [batch, target], or hidden states [batch, target, hidden] of earlier layers.
            memory: [batch, source, hidden] what the encoder gave; ``None`` where the cache has it.
            memory_mask: [batch, 1, target or 1, source], true where a query may see a key of ``memory``.
            mask: [batch or 1, 1, target, keys], likewise of what was written; ``None`` is causal.
            cache: keys and values of earlier tokens and of ``memory``.
            distances: [batch or 1, target, keys] from the key's to the query's position; ``None`` is one
                after another, the last query being the last key.

        Returns:
            [batch, target, hidden], before the head's norm.
        """
        hidden = self._embed(inputs)
        sequence, keys = inputs.shape[1], inputs.shape[1] + (0 if cache is None else cache.length)
        if mask is None:
            mask = writing_mask(sequence, keys, hidden.device)
        if distances is None:
            distances = distances_between(mask.shape[-2], mask.shape[-1], hidden.device)
        if self.decoder_positions is not None:
            mask = add_mask(self.decoder_positions(distances), mask)
        for index, layer in self.layers.items():
            if int(index) >= self.config.num_hidden_layers:
                hidden = layer(hidden, None, mask, cache, distances, memory, memory_mask)
        return hidden

    def shift_right(self, labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """What the decoder has written when it is to predict ``labels`` [batch, target].

        Every row, and every document of it, begins with ``decoder_start_token_id``; an ignored label is
        written as padding.
        """
        written = labels.masked_fill(labels == IGNORED_LABEL, self.config.pad_token_id).roll(1, dims=1)
        starts = torch.zeros_like(labels, dtype=torch.bool)
        if document_ids is not None:
            starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts[:, 0] = True
        return written.masked_fill(starts, self.config.decoder_start_token_id)

    def _embed(self, inputs: Tensor) -> Tensor:
        if inputs.is_floating_point():
            return inputs
        assert self.embedding is not None
        return self.embedding(inputs, torch.arange(inputs.shape[1], device=inputs.device)[None])


def reading_mask(
    attention_mask: Tensor | None, document_ids: Tensor | None, query_document_ids: Tensor | None
) -> Tensor | None:
    """Who may see which token of the source: [batch, 1, queries or 1, source], ``None`` where all may.

    Args:
        attention_mask: [batch, source], nonzero where there is a token.
        document_ids: [batch, source].
        query_document_ids: [batch, queries], of the source itself or of the target.
    """
    mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if document_ids is None or query_document_ids is None:
        return mask
    same = query_document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same if mask is None else same & mask


def writing_mask(
    queries: int,
    keys: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Who may see which token of the target: [batch or 1, 1, queries, keys], true for the past.

    Args:
        queries: new tokens, the last of ``keys``.
        keys: all tokens.
        device: of the mask.
        attention_mask: [batch, keys], nonzero where there is a token.
        document_ids: [batch, keys].
    """
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
    if document_ids is not None:
        seen = seen & (document_ids[:, None, -queries:, None] == document_ids[:, None, None, :])
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, :]
    return seen
