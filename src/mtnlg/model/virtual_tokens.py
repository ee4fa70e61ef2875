"""Trained vectors in a text's place: virtual tokens of prompt tuning, keys and values of prefix tuning.

Virtual token number k goes by the id ``vocab_size + k`` and has a position like any other token, so
that whatever handles tokens (batches, stages, caches) handles it. Prompt tuning (Lester et al. 2021,
arXiv 2104.08691) trains its embedding. Prefix tuning (Li and Liang 2021, arXiv 2101.00190; P-tuning v2,
arXiv 2110.07602) trains the keys and values that it has in each layer, in the place of those that the
layer would compute: the text sees nothing else of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.errors import ConfigError
from mtnlg.model.attention import Attention, KeyValueCache
from mtnlg.model.decoder import EVERY_DOCUMENT, DecoderOutput, MegatronLmDecoder
from mtnlg.model.encoder_decoder import MegatronEncoderDecoder
from mtnlg.model.loss import IGNORED_LABEL


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class VirtualTokens(nn.Module):
    """Embeddings of the ids from ``vocab_size`` on.

    ``local`` (from the parameter to what is computed with) and ``part`` (from ids of the whole sequence
    to those whose embeddings are made here) are attributes so that a layout can put its own in.

    Args:
        vocab_size: ids below it are ordinary tokens.
        count: virtual tokens.
        hidden_size: of an embedding.
        scale: that the model multiplies embeddings by afterwards. Trained ones are what comes of it, as in
            PEFT: they are divided by it here.
        dtype: of the parameter.
        device: likewise.
    """

    def __init__(
        self,
        vocab_size: int,
        count: int,
        hidden_size: int,
        scale: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size, self.scale = vocab_size, scale
        self.weight = nn.Parameter(torch.empty(count, hidden_size, dtype=dtype, device=device))
        self.local: Callable[[Tensor], Tensor] = _as_it_is
        self.part: Callable[[Tensor], Tensor] = _as_it_is

    def forward(self, token_ids: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
        """[batch, sequence] → [batch, sequence, hidden]; ``look_up`` embeds ordinary tokens."""
        found = look_up(token_ids.clamp(max=self.vocab_size - 1))
        number = self.part(token_ids) - self.vocab_size
        rows = F.embedding(number.clamp(0, len(self.weight) - 1), self.local(self.weight)).to(found.dtype)
        if self.scale is not None:
            rows = rows / rows.new_tensor(self.scale)
        return torch.where((number >= 0)[..., None], rows, found)


class PrefixKeyValues(nn.Module):
    """Keys and values of one layer's virtual tokens, the first of every sequence.

    ``local`` (from a parameter to the heads that are computed with) is an attribute so that a layout
    can put its own in.

    Args:
        count: virtual tokens.
        heads: of keys and values.
        head_size: dimensions of one.
        dtype: of the parameters.
        device: likewise.
    """

    def __init__(
        self,
        count: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(heads, count, head_size, dtype=dtype, device=device))
        self.value = nn.Parameter(torch.empty(heads, count, head_size, dtype=dtype, device=device))
        self.local: Callable[[Tensor], Tensor] = _as_it_is

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put them in the place of the first keys and values [batch, heads, keys, head_dim]."""
        return self._put(self.key, key), self._put(self.value, value)

    def _put(self, trained: Tensor, computed: Tensor) -> Tensor:
        first = self.local(trained).to(computed.dtype)[None].expand(len(computed), -1, -1, -1)
        return torch.cat([first, computed[:, :, first.shape[2] :]], dim=2)


def add_virtual_tokens(embedding: nn.Module, prompt: VirtualTokens | None, vocab_size: int) -> None:
    """Let ``embedding`` take virtual ids; without ``prompt`` what it gives for them is meaningless."""
    tokens = embedding.get_submodule("tokens")
    if prompt is not None:
        embedding.add_module("prompt", prompt)
    look_up = partial(_look_up, prompt, vocab_size, tokens.forward)
    tokens.forward = look_up  # type: ignore[method-assign]


def _look_up(
    prompt: VirtualTokens | None, vocab_size: int, look_up: Callable[[Tensor], Tensor], token_ids: Tensor
) -> Tensor:
    if prompt is None:
        return look_up(token_ids.clamp(max=vocab_size - 1))
    return prompt(token_ids, look_up)


def add_prefix(attention: Attention, prefix: PrefixKeyValues) -> None:
    """Let ``attention`` see ``prefix`` in the place of its first keys and values."""
    attention.add_module("prefix", prefix)
    attention.attention_function = partial(_attend, prefix, attention.attention_function)


def _attend(
    prefix: PrefixKeyValues,
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: object,
    **options: object,
) -> Tensor:
    return function(query, *prefix(key, value), *rest, **options)


def take_out_virtual_tokens(embedding: nn.Module) -> None:
    """Undo :func:`add_virtual_tokens`."""
    tokens = embedding.get_submodule("tokens")
    look_up = tokens.forward
    assert isinstance(look_up, partial) and look_up.func is _look_up, "something was put around it"
    del tokens.forward
    inner = look_up.args[2]
    if getattr(inner, "__self__", None) is not tokens:
        tokens.forward = inner  # type: ignore[method-assign]
    embedding._modules.pop("prompt", None)


def take_out_prefix(attention: Attention) -> None:
    """Undo :func:`add_prefix`."""
    function = attention.attention_function
    assert isinstance(function, partial) and function.func is _attend, "something was put around it"
    attention.attention_function = function.args[1]
    del attention._modules["prefix"]


def numbers_in_front(config: AdapterConfig) -> int:
    """Virtual tokens before everything; the others stand where the answer begins."""
    if config.prompt_style == "prepend" or config.method == "prefix":
        return config.num_positions
    return 0 if config.prompt_style == "append" else (config.num_positions + 1) // 2


def prompt_with_virtual(ids: list[int], config: AdapterConfig, vocab_size: int) -> list[int]:
    """The ids of a prompt whose answer is to be written, with the virtual ones where they stand."""
    virtual = list(range(vocab_size, vocab_size + config.num_positions))
    front = numbers_in_front(config)
    return virtual[:front] + ids + virtual[front:]


def rows_with_virtual(
    config: AdapterConfig,
    vocab_size: int,
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Texts with virtual tokens in them.

    Args:
        config: how many and where.
        vocab_size: id of the first.
        input_ids: [batch, sequence].
        labels: [batch, sequence] next tokens, -100 ignored; an answer begins at the first that counts.
        position_ids: [batch or 1, sequence]; only documents that begin anew have other positions than
            their columns.
        document_ids: [batch, sequence]; tokens of all documents see virtual tokens, which then all
            stand in front.

    Returns:
        The four, longer by the virtual tokens, and the column that each text token has now,
        [batch, sequence].
    """
    batch, sequence = input_ids.shape
    count, front = config.num_positions, numbers_in_front(config)
    device = input_ids.device
    places = torch.arange(sequence, device=device).expand(batch, -1)
    after = places >= sequence if labels is None else _after_prompt(labels)
    columns = places + front + after * (count - front)
    ids = torch.empty(batch, sequence + count, dtype=input_ids.dtype, device=device)
    is_virtual = torch.ones_like(ids, dtype=torch.bool).scatter_(1, columns, False)
    virtual = torch.arange(vocab_size, vocab_size + count, dtype=ids.dtype, device=device)
    ids[is_virtual] = virtual.repeat(batch)
    ids.scatter_(1, columns, input_ids)
    if labels is not None:
        labels = _labels_with_virtual(labels, columns, after, count - front, sequence + count)
    if document_ids is not None:
        assert front == count, "packed documents have their virtual tokens in front of all of them"
        document_ids = F.pad(document_ids, (count, 0), value=EVERY_DOCUMENT)
    if position_ids is not None:
        first = torch.arange(count, device=device).expand(len(position_ids), -1)
        position_ids = torch.cat([first, position_ids + count], dim=1) if front == count else None
    return ids, labels, position_ids, document_ids, columns


def _after_prompt(labels: Tensor) -> Tensor:
    """Which tokens belong to the answer: all after the first whose label counts, [batch, sequence]."""
    counts = (labels != IGNORED_LABEL).cumsum(dim=1)
    return F.pad(counts > 0, (1, 0))[:, :-1]


def _labels_with_virtual(labels: Tensor, columns: Tensor, after: Tensor, behind: int, width: int) -> Tensor:
    """The answer's first token is predicted by the last of the virtual tokens before it."""
    longer = labels.new_full((len(labels), width), IGNORED_LABEL)
    is_last = ~after & (labels != IGNORED_LABEL)  # the token before the answer
    return longer.scatter_(1, columns + is_last * behind, labels)


def source_with_virtual(
    config: AdapterConfig, vocab_size: int, source: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """What an encoder reads, with virtual tokens before it.

    Args:
        config: how many.
        vocab_size: id of the first.
        source: [batch, sequence] ids.
        mask: [batch, sequence], nonzero where there is a token.

    Returns:
        The two, longer by the virtual tokens.
    """
    virtual = torch.arange(vocab_size, vocab_size + config.num_positions, device=source.device)
    ids = torch.cat([virtual.to(source.dtype).expand(len(source), -1), source], dim=1)
    return ids, None if mask is None else F.pad(mask, (config.num_positions, 0), value=1)


def insert_virtual_source(model: MegatronEncoderDecoder, config: AdapterConfig) -> None:
    """Let ``model(ids, ...)`` put virtual tokens before what its encoder reads."""
    model.forward = partial(_read_source, model, config, model.forward)  # type: ignore[method-assign]


def _read_source(
    model: MegatronEncoderDecoder,
    config: AdapterConfig,
    forward: Callable[..., DecoderOutput],
    input_ids: Tensor,
    decoder_input_ids: Tensor | None = None,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    decoder_document_ids: Tensor | None = None,
) -> DecoderOutput:
    if document_ids is not None:
        raise ConfigError("document_ids: an encoder's virtual tokens would see all documents.")
    ids, mask = source_with_virtual(config, model.config.vocab_size, input_ids, attention_mask)
    return forward(ids, decoder_input_ids, labels, mask, decoder_attention_mask)


def insert_virtual_tokens(decoder: MegatronLmDecoder, config: AdapterConfig) -> None:
    """Let ``decoder(ids)`` put virtual tokens among the ids; what it gives is about the text alone."""
    forward = partial(_read_with_virtual, decoder, config, decoder.forward)
    decoder.forward = forward  # type: ignore[method-assign]


def _read_with_virtual(
    decoder: MegatronLmDecoder,
    config: AdapterConfig,
    forward: Callable[..., DecoderOutput],
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: KeyValueCache | None = None,
    logits_at: Tensor | None = None,
) -> DecoderOutput:
    if cache is not None:  # earlier tokens are known to whoever has them
        return forward(input_ids, labels, position_ids, document_ids, attention_mask, cache, logits_at)
    if attention_mask is not None:
        raise ConfigError("attention_mask: virtual tokens are not in it; give document_ids instead.")
    vocab_size = decoder.config.vocab_size
    ids, labels, positions, documents, columns = rows_with_virtual(
        config, vocab_size, input_ids, labels, position_ids, document_ids
    )
    # What follows the text is said after the virtual tokens that stand behind it.
    columns = torch.cat([columns[:, :-1], columns[:, -1:] + config.num_positions], dim=1)
    columns[:, -1] -= numbers_in_front(config)
    if logits_at is not None:
        logits_at = columns.gather(1, logits_at[:, None])[:, 0]
    output = forward(ids, labels, positions, documents, None, None, logits_at)
    if output.logits is not None and logits_at is None:
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        output.logits = output.logits[rows, columns]
    return output
