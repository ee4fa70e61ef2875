"""``model.generate``: a prompt of any kind, everything one can ask for, an answer of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mtnlg.config.generation import EngineConfig
from mtnlg.generation.generate import run_together
from mtnlg.generation.keeper import EngineKeeper, evaluating
from mtnlg.generation.options import check_names, num_samples, requests_for
from mtnlg.generation.prompts import Prompt, Prompts, end_id, start_ids
from mtnlg.generation.request import Generation, TokenEvent
from mtnlg.model import MegatronLmDecoder
from mtnlg.tokens import Tokenizer


def answer(
    model: MegatronLmDecoder,
    tokenizer: Tokenizer | None,
    keeper: EngineKeeper,
    config: EngineConfig | None,
    prompt: Prompt,
    options: Mapping[str, Any],
) -> Any:
    """Continue a prompt.

    Args:
        model: the decoder; it is put into evaluation mode for the time being.
        tokenizer: between text and ids.
        keeper: keeps the engine from one call to the next.
        config: the engine's settings.
        prompt: of any kind.
        options: as :class:`~mtnlg.generation.options.DetailedOptions` says.

    Raises:
        ConfigError: naming what is wrong with the prompt and the options.
    """
    check_names(options)
    prompts = Prompts.read(prompt, tokenizer)
    wanted, drawn = num_samples(options, len(prompts.rows))
    start: list[int] = []
    if prompts.texts is not None and tokenizer is not None and options.get("start_of_document", True):
        start = start_ids(tokenizer, model.config.vocab_size)
    rows = [start + row for row in prompts.rows]
    ends = [end for end in [end_id(tokenizer)] if end is not None and end < model.config.vocab_size]
    requests = requests_for(rows, options, ends, len(start), drawn)
    decode = None if tokenizer is None else tokenizer.decode
    engine = keeper.engine(model, decode, config, options.get("use_cache"))
    with evaluating(model):
        found = run_together(engine, requests, _listener(options.get("streamer"), prompts))
    answers = []
    for number in range(len(rows)):
        several = _best(found[number * drawn : (number + 1) * drawn], wanted)
        given = [one if options.get("details") else _plain(prompts, number, one) for one in several]
        answers.append(given if options.get("n") is not None else given[0])
    return prompts.as_given(answers, tokenizer)


def _plain(prompts: Prompts, number: int, found: Generation) -> str | list[int]:
    """The prompt with its continuation."""
    if prompts.texts is None:
        return found.ids
    return prompts.texts[number] + found.text


def _best(found: list[Generation], wanted: int) -> list[Generation]:
    """The likeliest of several continuations by the mean log-probability of their tokens."""
    if len(found) == wanted:
        return found

    def score(generation: Generation) -> float:
        scores = [one.logprob for one in generation.logprobs if one.logprob is not None]
        return sum(scores) / len(scores) if scores else float("-inf")

    return sorted(found, key=score, reverse=True)[:wanted]


def _listener(
    streamer: Callable[[Any], None] | None, prompts: Prompts
) -> Callable[[int, TokenEvent], None] | None:
    if streamer is None:
        return None

    def hear(_number: int, event: TokenEvent) -> None:
        if prompts.texts is not None:
            if event.text:
                streamer(event.text)
        elif event.token is not None:
            streamer(event.token)

    return hear
