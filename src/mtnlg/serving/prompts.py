"""From what a request asks to what the engine is asked: prompts as ids, rules, limits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.constraint import Constraint
from mtnlg.generation.request import GenerationRequest
from mtnlg.generation.sampling import SamplingRules
from mtnlg.serving.errors import invalid, too_long
from mtnlg.serving.schemas import Guidance, Sampling
from mtnlg.serving.state import ServerState, Visit

Result = TypeVar("Result")
Prompts: TypeAlias = str | list[str] | list[int] | list[list[int]]
SHORT = 2048  # characters: tokenized at once, which is quicker than asking a thread

# Field of a request: kind of rule.
GUIDED = {
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_choice": "choice",
    "guided_verse": "verse",
}


async def off_the_loop(state: ServerState, work: Callable[[], Result], is_slow: bool = False) -> Result:
    """Do something in a thread, so that nobody else waits for it; slow things in threads of their own."""
    workers = state.backend.slow_workers if is_slow else state.backend.workers
    return await asyncio.get_running_loop().run_in_executor(workers, work)


async def prompt_rows(
    state: ServerState,
    prompt: Prompts,
    param: str = "prompt",
    add_special: bool = True,
    parse_special: bool = True,
) -> tuple[list[str | None], list[list[int]]]:
    """Texts, where the prompt is text, and ids of each prompt.

    Raises:
        ApiError: 400: no prompt, or one that cannot be.
    """
    rows: list[Any] = [prompt] if is_one(prompt) else list(prompt)
    if not rows:
        raise invalid(f"Invalid '{param}': empty array.", param, "empty_array")
    if isinstance(rows[0], str):
        start = list(state.backend.start_ids) if add_special else []
        return rows, [start + ids for ids in await ids_of_texts(state, rows, param, parse_special)]
    _check_ids(state, rows, param)
    return [None] * len(rows), rows


def is_one(prompt: Prompts) -> bool:
    """Whether it is a single text or a single list of ids."""
    return isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))


def with_adapters_text(prompt: Prompts, adapter: LoadedAdapter) -> Prompts:
    """Texts with what the adapter was trained to find around them; ids as they are."""
    config = adapter.adapter.config
    if isinstance(prompt, str):
        return f"{config.prefix}{prompt}{config.suffix}"
    texts = [text for text in prompt if isinstance(text, str)]
    return [f"{config.prefix}{text}{config.suffix}" for text in texts] if texts else prompt


async def ids_of_texts(
    state: ServerState, texts: Sequence[str], param: str, parse_special: bool
) -> list[list[int]]:
    """Tokens of each text.

    Raises:
        ApiError: 400: one has more than the model takes, or is no Unicode.
    """
    backend = state.backend
    least = max(map(backend.least_tokens, texts))
    if least > backend.engine.max_length:
        raise invalid(
            f"This model's maximum context length is {backend.engine.max_length} tokens. However, your "
            f"{param} has at least {least}. Please reduce its length.",
            param,
            "context_length_exceeded",
        )

    def encode() -> list[list[int]]:
        return [backend.tokenizer.encode(text, allow_special=parse_special) for text in texts]

    try:
        is_short = sum(map(len, texts)) <= SHORT
        return encode() if is_short else await off_the_loop(state, encode)
    except DataError as error:
        raise invalid(f"Invalid '{param}': {error}", param, "invalid_value") from error


def _check_ids(state: ServerState, rows: Sequence[Sequence[int]], param: str) -> None:
    size = state.backend.vocab_size
    for ids in rows:
        largest = max(ids)
        if largest >= size:
            message = f"Invalid '{param}': token {largest} is not in the vocabulary (0 to {size - 1})."
            raise invalid(message, param, "invalid_value")


def check_lengths(
    state: ServerState,
    rows: Sequence[Sequence[int]],
    wanted: int,
    param: str,
    adapter: LoadedAdapter | None = None,
) -> None:
    """Raise ApiError 400 where a prompt is empty, or does not fit the context with ``wanted`` more.

    An encoder-decoder has the room twice: for what is read and, after one token, for what is written.
    """
    limit = state.longest(adapter)
    for ids in rows:
        if not ids:
            raise invalid(f"Invalid '{param}': it has no tokens. Give at least one.", param, "empty_prompt")
        longest = max(len(ids), wanted + 1) if state.backend.reads_source else len(ids) + wanted
        if longest > limit:
            raise too_long(limit, len(ids), wanted, param)


def logit_bias(body: Sampling, vocab_size: int) -> dict[int, float]:
    """What is added to which token's logit.

    Raises:
        ApiError: 400: a key is no token id.
    """
    found: dict[int, float] = {}
    for key, value in (body.logit_bias or {}).items():
        if not re.fullmatch("[0-9]{1,18}", key):
            message = "Invalid 'logit_bias': its keys must be token ids, whole numbers."
            raise invalid(message, "logit_bias", "invalid_value")
        found[int(key)] = value
    if found and max(found) >= vocab_size:
        message = f"token {max(found)} is not in the vocabulary (0 to {vocab_size - 1})."
        raise invalid(f"Invalid 'logit_bias': {message}", "logit_bias", "invalid_value")
    return found


def sampling_rules(body: Sampling, vocab_size: int) -> SamplingRules:
    """How tokens are drawn.

    Raises:
        ApiError: 400: what a rule cannot be.
    """
    bias = logit_bias(body, vocab_size)
    try:
        return SamplingRules(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(0, body.top_k or 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else body.seed % 2**64,
            min_p=body.min_p or 0.0,
            typical_p=1.0 if body.typical_p is None else body.typical_p,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            no_repeat_ngram_size=body.no_repeat_ngram_size or 0,
            logit_bias=tuple(bias.items()),
        )
    except ConfigError as error:
        raise invalid(" ".join(error.problems)) from error


def stop_strings(body: Sampling) -> list[str]:
    """What ends an answer.

    Raises:
        ApiError: 400: one is empty.
    """
    stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    if "" in stop:
        raise invalid("Invalid 'stop': a stop string must not be empty.", "stop", "invalid_value")
    return stop


def base_request(
    state: ServerState, visit: Visit, body: Sampling, adapter: LoadedAdapter | None
) -> GenerationRequest:
    """What all sequences of a request have in common; the prompt is still to be put in."""
    limits = [seconds for seconds in (state.config.request_timeout_seconds, body.timeout) if seconds]
    return GenerationRequest(
        prompt_ids=(),
        rules=sampling_rules(body, state.backend.vocab_size),
        min_new_tokens=body.min_tokens or 0,
        end_ids=() if body.ignore_eos else state.backend.end_ids,
        stop=stop_strings(body),
        include_stop=bool(body.include_stop_str_in_output),
        deadline_seconds=max(min(limits) - visit.seconds, 0.001) if limits else None,
        adapter=None if adapter is None else adapter.name,
    )


def sequences(
    base: GenerationRequest, rows: Sequence[Sequence[int]], num_each: int
) -> list[GenerationRequest]:
    """``num_each`` requests for each prompt, prompt by prompt; a prompt's draw from different streams."""
    return [replace(base, prompt_ids=ids, stream=number) for ids in rows for number in range(num_each)]


async def constraint_of(state: ServerState, body: Guidance) -> Constraint | None:
    """The rule that a request's ``guided_*`` field asks for.

    Raises:
        ApiError: 400: two rules, or one that cannot be used.
    """
    given = [name for name in GUIDED if getattr(body, name) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise invalid(f"Give one of {' and '.join(given)}, not both.", given[1], "invalid_value")
    return await compiled(state, GUIDED[given[0]], getattr(body, given[0]), given[0])


async def compiled(state: ServerState, kind: str, value: Any, param: str) -> Constraint:
    """A rule, ready for use.

    Raises:
        ApiError: 400: it cannot be used, or takes too long; the message says what is wrong with it.
    """
    from mtnlg.generation.constraints import options

    backend, seconds = state.backend, state.config.constraint_timeout_seconds

    def compile_rule() -> Constraint:
        return options.constraint_from_options(
            backend.tokenizer, backend.vocab_size, kind, value, backend.end_ids
        )

    try:
        async with asyncio.timeout(seconds):
            return await off_the_loop(state, compile_rule, is_slow=True)
    except TimeoutError as error:
        message = (
            f"Invalid '{param}': the rule was not ready after {seconds:g} seconds. Use a simpler one, or "
            "ask the server's owner for a longer --constraint-timeout."
        )
        raise invalid(message, param, "constraint_too_slow") from error
    except ConfigError as error:
        raise invalid(f"Invalid '{param}': {' '.join(error.problems)}", param, "invalid_value") from error


def check_count(state: ServerState, count: int, param: str) -> None:
    """Raise ApiError 400 where one request asks for more sequences than the server takes."""
    config = state.backend.engine.config
    most = min(state.config.max_choices, config.max_batch_size + config.max_queue_size)
    if count > most:
        message = f"This request asks for {count} sequences. Ask for at most {most} at a time."
        raise invalid(message, param, "too_many_sequences")
