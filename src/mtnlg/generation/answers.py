"""``model.generate``: a prompt of any kind, everything one can ask for, an answer of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mtnlg.config import MegatronModelConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.errors import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.beam import beam_search
from mtnlg.generation.contrastive import contrastive_search
from mtnlg.generation.engine import Engine
from mtnlg.generation.generate import run_together
from mtnlg.generation.keeper import EngineKeeper, evaluating
from mtnlg.generation.options import (
    check_names,
    constraint_for,
    num_samples,
    requests_for,
    search_options,
)
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.prompts import Prompt, Prompts, end_id, start_ids
from mtnlg.generation.request import Generation, GenerationRequest, TokenEvent
from mtnlg.generation.runner import Runner, RunnerWithAdapter
from mtnlg.generation.samples import best_samples
from mtnlg.generation.search import Access, SearchOptions
from mtnlg.generation.text import continuation_text
from mtnlg.model import LanguageModel, MegatronLmDecoder
from mtnlg.tokens import Tokenizer


def answer(
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    keeper: EngineKeeper,
    config: EngineConfig | None,
    prompt: Prompt,
    options: Mapping[str, Any],
    draft_model: MegatronLmDecoder | None = None,
) -> Any:
    """Continue a prompt.

    Args:
        model: the decoder; it is put into evaluation mode for the time being.
        tokenizer: between text and ids.
        keeper: keeps the engine from one call to the next.
        config: the engine's settings.
        prompt: of any kind.
        options: as :class:`~mtnlg.generation.options.DetailedOptions` says.
        draft_model: guesses tokens, where the settings say so.

    Raises:
        ConfigError: naming what is wrong with the prompt and the options.
    """
    check_names(options)
    prompts, start = _read_prompts(model, tokenizer, prompt, options)
    wanted, drawn = num_samples(options, len(prompts.rows))
    rows = [start + row for row in prompts.rows]
    ends = _end_ids(options, tokenizer, model.config)
    constraint = constraint_for(options, tokenizer, model.config.vocab_size, ends)
    search = search_options(options, wanted)
    drawn = 1 if search is not None else drawn
    requests = requests_for(rows, options, ends, len(start), drawn, constraint)
    decode = None if tokenizer is None else tokenizer.decode
    engine = keeper.engine(model, decode, config, options.get("use_cache"), draft_model)
    with evaluating(model):
        if search is None:
            found = run_together(engine, requests, _listener(options, prompts))
            groups = [found[at : at + drawn] for at in range(0, len(found), drawn)]
            if options.get("best_of") is not None:
                groups = [best_samples(group, wanted) for group in groups]
        else:
            groups = [search_one(engine, request, search) for request in requests]
    answers = []
    for number, several in enumerate(groups):
        given = [one if options.get("details") else _plain(prompts, number, one) for one in several]
        answers.append(given if options.get("n") is not None else given[0])
    return prompts.as_given(answers, tokenizer)


def _read_prompts(
    model: LanguageModel, tokenizer: Tokenizer | None, prompt: Prompt, options: Mapping[str, Any]
) -> tuple[Prompts, list[int]]:
    """What was asked as ids, an adapter's own text around it, and the ids that begin every text."""
    prompts = Prompts.read(prompt, tokenizer)
    if model.config.architecture == "encoder_decoder":
        return prompts.as_sources(model.config), []
    if prompts.texts is None or tokenizer is None:
        return prompts, []
    adapter: AdapterConfig | None = getattr(model, "adapter", None)
    if adapter is not None and (adapter.prefix or adapter.suffix):
        around = [f"{adapter.prefix}{text}{adapter.suffix}" for text in prompts.texts]
        prompts.rows = [tokenizer.encode(text) for text in around]
    starts = options.get("start_of_document", True)
    return prompts, start_ids(tokenizer, model.config.vocab_size) if starts else []


def search_one(engine: Engine, request: GenerationRequest, options: SearchOptions) -> list[Generation]:
    """The continuations that a search finds for one prompt, best first, as finished generations.

    Raises:
        ConfigError: the request asks for what a search cannot do.
        MtnlgError: the memory for keys and values is too small.
    """
    request = engine.with_source(request)
    max_length = engine.check(request)
    access = _access_for(engine, request)
    if options.penalty_alpha is not None:
        results = [contrastive_search(access, request, options, max_length)]
    else:
        results = beam_search(access, request, options, max_length)
    found = []
    for result in results:
        generation = Generation(request)
        generation.new_ids, generation.score = list(result.new_ids), result.score
        generation.usage.new_tokens = len(result.new_ids)
        generation.finish_reason = result.finish_reason
        if engine.decode is not None:
            said = result.new_ids[:-1] if result.finish_reason == "end" else result.new_ids
            generation.text = continuation_text(engine.decode, request.prompt_ids, said)
        found.append(generation)
    return found


def _access_for(engine: Engine, request: GenerationRequest) -> Access:
    """What :meth:`Engine.exclusively` gives, with the request's adapter in every row.

    Raises:
        ConfigError: its adapter has virtual tokens, with which nothing is searched.
    """
    loaded = engine.adapters.get(request.adapter)
    if loaded is None:
        if engine.own_adapter is not None and engine.own_adapter.num_positions:
            raise ConfigError(
                "beam and contrastive search: a model with virtual tokens is not searched. Sample, or "
                "go on greedily."
            )
        return engine.exclusively
    if loaded.num_virtual:
        raise ConfigError(
            f"adapter {loaded.name!r} has virtual tokens: beam and contrastive search do not go with "
            "them. Sample, or go on greedily."
        )

    @contextmanager
    def access() -> Iterator[tuple[Runner, PageBooks]]:
        with engine.exclusively() as (runner, books):
            yield RunnerWithAdapter(runner, loaded), books

    return access


def _end_ids(
    options: Mapping[str, Any], tokenizer: Tokenizer | None, config: MegatronModelConfig
) -> list[int]:
    chosen = options.get("end_ids")
    if chosen is not None:
        return list(chosen)
    if config.architecture == "encoder_decoder":
        return [config.eos_token_id]
    return [end for end in [end_id(tokenizer)] if end is not None and end < config.vocab_size]


def _plain(prompts: Prompts, number: int, found: Generation) -> str | list[int]:
    """The prompt with its continuation; an encoder-decoder's source is no part of it."""
    if prompts.texts is None:
        return found.ids
    return prompts.texts[number] + found.text


def _listener(options: Mapping[str, Any], prompts: Prompts) -> Callable[[int, TokenEvent], None] | None:
    streamer, listener = options.get("streamer"), options.get("listener")
    if streamer is None:
        return listener

    def hear(number: int, event: TokenEvent) -> None:
        if listener is not None:
            listener(number, event)
        if prompts.texts is not None:
            if event.text:
                streamer(event.text)
        elif event.token is not None:
            streamer(event.token)

    return hear
