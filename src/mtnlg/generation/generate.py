"""Prompts in, their continuations out: requests of one call, put through an engine together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

from mtnlg.config import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.engine import Engine
from mtnlg.generation.keeper import EngineKeeper, evaluating
from mtnlg.generation.request import Generation, GenerationRequest, TokenEvent
from mtnlg.generation.sampling import SamplingRules
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder

TokenCallback = Callable[[int, int], None]  # (row, token)


def generate(
    model: MegatronLmDecoder | MegatronEncoderDecoder,
    prompts: Sequence[Sequence[int]],
    rules: SamplingRules | None = None,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    end_ids: Collection[int] = (),
    use_cache: bool | None = None,
    on_token: TokenCallback | None = None,
) -> list[Generation]:
    """Continue each prompt until its length or an end token; prompts may differ in length.

    For one call: the engine is thrown away afterwards. ``model.generate`` keeps one.

    Args:
        model: the decoder; it is put into evaluation mode for the time being.
        prompts: token ids, at least one each.
        rules: how tokens are drawn; greedy by default. Each row draws from a stream of its own.
        max_length: total tokens of prompt and continuation, as in transformers.
        max_new_tokens: tokens of the continuation (64 if neither is given). With both given, the
            smaller end counts; generation never goes past ``max_position_embeddings``.
        end_ids: tokens that end a sequence; they are kept as its last.
        use_cache: keep keys and values (one new token costs one step) or run over the whole sequence
            each time; ``None`` is the config's ``use_cache``. Both give the same logits.
        on_token: called with (row, token) for each token as soon as it is known.

    Returns:
        One finished generation for each prompt, in order.

    Raises:
        ConfigError: a prompt is empty, holds ids outside the vocabulary, or leaves no room.
    """
    requests = [
        GenerationRequest(
            prompt,
            rules or SamplingRules(),
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            end_ids=end_ids,
            stream=row,
        )
        for row, prompt in enumerate(prompts)
    ]
    config = EngineConfig(max_batch_size=max(1, min(32, len(prompts))), prefix_cache=False, compile="off")
    hear = None

    if on_token is not None:

        def hear(row: int, event: TokenEvent) -> None:
            if event.token is not None:
                on_token(row, event.token)

    with evaluating(model):
        engine = EngineKeeper().engine(model, None, config, use_cache)
        return run_together(engine, requests, hear)


def run_together(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    hear: Callable[[int, TokenEvent], None] | None = None,
) -> list[Generation]:
    """Put requests through an engine and wait for all of them.

    If one is refused, or whoever listens fails, or Ctrl-C comes, the others are cancelled.

    Args:
        engine: with or without a thread of its own.
        requests: what to generate.
        hear: called with (number of the request, event) as things become known, on this thread.

    Raises:
        ConfigError: a request cannot be answered.
        MtnlgError: the model failed.
    """
    _warn_of_the_last_position(engine, requests)
    found: list[Generation] = []
    try:
        for number, request in enumerate(requests):
            try:
                found.append(engine.submit(request))
            except ConfigError as error:
                if len(requests) == 1:
                    raise
                raise ConfigError([f"prompt {number}: {problem}" for problem in error.problems]) from None
        for number, event in _events(found):
            if hear is not None:
                hear(number, event)
    finally:
        for generation in found:
            generation.cancel()
    return found


def _events(found: Sequence[Generation]) -> Iterator[tuple[int, TokenEvent]]:
    """(number, event) of many generations in the order in which they become known."""
    if len(found) == 1:
        yield from ((0, event) for event in found[0])
        return
    unfinished = list(enumerate(found))
    while unfinished:
        # Waiting for the oldest drives the engine; the others' events have come meanwhile.
        number, oldest = unfinished[0]
        yield number, oldest.next_event()
        for number, generation in unfinished:
            yield from ((number, event) for event in generation.events_so_far())
        for _, generation in unfinished:
            if generation.is_finished and generation.error is not None:
                raise generation.error
        unfinished = [(number, one) for number, one in unfinished if not one.is_over]


def _warn_of_the_last_position(engine: Engine, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        ends = [
            request.max_length,
            request.max_new_tokens and len(request.prompt_ids) + request.max_new_tokens,
        ]
        if min((end for end in ends if end is not None), default=0) > engine.max_length:
            warnings.warn(
                "more tokens were asked for than the model has positions: generation stops at "
                f"{engine.max_length} (max_position_embeddings).",
                stacklevel=4,
            )
            return
