"""The generation loop: a batch of prompts in, their continuations out.

Three parts that know nothing of each other: :func:`next_logits` runs the model over whatever its cache
does not hold yet, ``sampling`` chooses tokens, and the loop here decides who is finished.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtnlg.config import ConfigError
from mtnlg.generation.cache import FIRST_CAPACITY, KeyValueCache
from mtnlg.generation.distribution import choose_tokens
from mtnlg.generation.sampling import SamplingRules, row_generators
from mtnlg.model import MegatronLmDecoder

DEFAULT_NEW_TOKENS = 64
TokenCallback = Callable[[int, int], None]  # (row, token)


@dataclass
class Continuation:
    """One sequence while it grows, and what became of it.

    Args:
        ids: the prompt and every token generated, the end token included.
        num_prompt_tokens: how many of them the prompt had.
        max_length: total tokens at which it stops.
        finish_reason: ``"end"`` (an end token came), ``"length"``, or ``None`` while it grows.
    """

    ids: list[int]
    num_prompt_tokens: int
    max_length: int
    finish_reason: str | None = None

    @property
    def new_ids(self) -> list[int]:
        """The tokens generated."""
        return self.ids[self.num_prompt_tokens :]

    def append(self, token: int, end_ids: Collection[int]) -> None:
        """Take one more token and see whether it was the last."""
        self.ids.append(token)
        if token in end_ids:
            self.finish_reason = "end"
        elif len(self.ids) >= self.max_length:
            self.finish_reason = "length"


def generate(
    model: MegatronLmDecoder,
    prompts: Sequence[Sequence[int]],
    rules: SamplingRules | None = None,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    end_ids: Collection[int] = (),
    use_cache: bool | None = None,
    on_token: TokenCallback | None = None,
) -> list[Continuation]:
    """Continue each prompt until its length or an end token; prompts may differ in length.

    Generation never goes past ``max_position_embeddings``: it stops there, with a warning if more
    was asked for.

    Args:
        model: the decoder; it is put into evaluation mode for the time being.
        prompts: token ids, at least one each.
        rules: how tokens are drawn; greedy by default.
        max_length: total tokens of prompt and continuation, as in transformers.
        max_new_tokens: tokens of the continuation (64 if neither is given). With both given, the
            smaller end counts.
        end_ids: tokens that end a sequence; they are kept as its last.
        use_cache: keep keys and values (one new token costs one step) or run over the whole sequence
            each time; ``None`` is the config's ``use_cache``. Both give the same logits.
        on_token: called with (row, token) for each token as soon as it is known.

    Returns:
        One continuation for each prompt, in order.

    Raises:
        ConfigError: a prompt is empty, holds ids outside the vocabulary, or leaves no room.
    """
    rules = rules or SamplingRules()
    sequences = _begin(model, prompts, max_length, max_new_tokens)
    if use_cache is None:
        use_cache = model.config.use_cache
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _run(model, sequences, rules, end_ids, use_cache, on_token)
    finally:
        model.train(was_training)
    return sequences


def _run(
    model: MegatronLmDecoder,
    sequences: list[Continuation],
    rules: SamplingRules,
    end_ids: Collection[int],
    use_cache: bool,
    on_token: TokenCallback | None,
) -> None:
    active = list(range(len(sequences)))
    generators = row_generators(rules.seed, len(sequences))
    cache = None
    if use_cache and active:
        longest = max(sequence.max_length for sequence in sequences)
        first = max(len(sequence.ids) for sequence in sequences) + FIRST_CAPACITY
        cache = KeyValueCache.for_model(model, len(active), min(longest, first))
    while active:
        logits = next_logits(model, [sequences[row].ids for row in active], cache)
        tokens = choose_tokens(logits, rules, [generators[row] for row in active]).tolist()
        for row, token in zip(active, tokens):
            sequences[row].append(token, end_ids)
            if on_token is not None:
                on_token(row, token)
        places = [place for place, row in enumerate(active) if not sequences[row].finish_reason]
        if len(places) < len(active):
            active = [active[place] for place in places]
            if cache is not None:
                cache.keep_rows(places)


def next_logits(
    model: MegatronLmDecoder, sequences: Sequence[Sequence[int]], cache: KeyValueCache | None
) -> Tensor:
    """Logits of the token after each sequence.

    Runs the model over what ``cache`` does not hold yet: everything the first time (or without a
    cache), one token each later. Shorter rows are padded on the right, where causal attention
    cannot see the padding, and the cache is then cut back to the true lengths.

    Args:
        model: the decoder.
        sequences: [batch] whole sequences, each longer than what the cache holds of it.
        cache: earlier keys and values; brought up to date here.

    Returns:
        [batch, vocab]
    """
    device = next(model.parameters()).device
    held = cache.lengths if cache is not None else [0] * len(sequences)
    new = [list(ids[start:]) for ids, start in zip(sequences, held, strict=True)]
    width = max(len(ids) for ids in new)
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in new], device=device)
    mask = positions = None
    if cache is not None:
        mask, positions = cache.mask(width, device), cache.positions(width, device)
    if positions is not None:  # padding may count past the last learned position; nobody sees it
        positions = positions.clamp(max=model.config.max_position_embeddings - 1)
    last = torch.tensor([len(ids) - 1 for ids in new], device=device)
    output = model(input_ids, position_ids=positions, attention_mask=mask, cache=cache, logits_at=last)
    if cache is not None:
        cache.truncate([len(ids) for ids in sequences])
    return output.logits[:, 0]


def _begin(
    model: MegatronLmDecoder,
    prompts: Sequence[Sequence[int]],
    max_length: int | None,
    max_new_tokens: int | None,
) -> list[Continuation]:
    if next(model.parameters()).is_meta:
        raise ConfigError("the model is on the meta device and has no weights to generate with.")
    problems = [
        f"{name} is {value}: it must be at least 1."
        for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens))
        if value is not None and value < 1
    ]
    if problems:
        raise ConfigError(problems)
    if max_length is None and max_new_tokens is None:
        max_new_tokens = DEFAULT_NEW_TOKENS
    sequences = []
    for row, prompt in enumerate(prompts):
        _check_prompt(model, row, prompt, max_length)
        ends = [
            end for end in (max_length, max_new_tokens and len(prompt) + max_new_tokens) if end is not None
        ]
        sequences.append(Continuation(list(prompt), len(prompt), min(ends)))
    _stop_at_last_position(sequences, model.config.max_position_embeddings)
    return sequences


def _check_prompt(
    model: MegatronLmDecoder, row: int, prompt: Sequence[int], max_length: int | None
) -> None:
    config, length = model.config, len(prompt)
    if not length:
        raise ConfigError(f"prompt {row} is empty: give at least one token to continue from.")
    outside = [token for token in prompt if not 0 <= token < config.vocab_size]
    if outside:
        raise ConfigError(
            f"prompt {row} holds token {outside[0]}: the vocabulary has 0 to {config.vocab_size - 1}."
        )
    if length >= config.max_position_embeddings:
        raise ConfigError(
            f"prompt {row} has {length} tokens and the model {config.max_position_embeddings} "
            "positions (max_position_embeddings): shorten the prompt, nothing can follow it."
        )
    if max_length is not None and length >= max_length:
        raise ConfigError(
            f"prompt {row} has {length} tokens already and max_length is {max_length}, which counts "
            "prompt and continuation together: raise it, or give max_new_tokens instead."
        )


def _stop_at_last_position(sequences: list[Continuation], limit: int) -> None:
    if any(sequence.max_length > limit for sequence in sequences):
        warnings.warn(
            f"more tokens were asked for than the model has positions: generation stops at {limit} "
            "(max_position_embeddings).",
            stacklevel=4,
        )
    for sequence in sequences:
        sequence.max_length = min(sequence.max_length, limit)
