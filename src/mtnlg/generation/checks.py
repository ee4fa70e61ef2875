"""Whether a request can be answered at all, and how long it may get."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtnlg.config import ConfigError
from mtnlg.generation.request import DEFAULT_NEW_TOKENS, GenerationRequest

MOST_LOGPROBS = 1000  # alternatives of one token that are worth sending anywhere


def check_request(request: GenerationRequest, vocab_size: int, limit: int, has_text: bool) -> int:
    """The total length at which a request ends.

    Args:
        request: what is asked.
        vocab_size: tokens that the model knows.
        limit: most tokens of prompt and continuation that the model and its memory can hold.
        has_text: whether ids can be turned into text, which stop strings need.

    Raises:
        ConfigError: naming everything that is wrong.
    """
    problems = [*_prompt_problems(request, vocab_size, limit), *_length_problems(request)]
    if request.source_ids is not None:
        problems = [*_source_problems(request.source_ids, vocab_size, limit), *_length_problems(request)]
    problems += _other_problems(request, vocab_size, has_text)
    if problems:
        raise ConfigError(problems)
    length = len(request.prompt_ids)
    if request.hidden:
        return length
    ends = [limit]
    if request.max_length is not None:
        ends.append(request.max_length)
    if request.max_new_tokens is not None:
        ends.append(length + request.max_new_tokens)
    elif request.max_length is None:
        ends.append(length + DEFAULT_NEW_TOKENS)
    return min(ends)


def _prompt_problems(request: GenerationRequest, vocab_size: int, limit: int) -> list[str]:
    ids = request.prompt_ids
    if not len(ids):
        return ["the prompt is empty: give at least one token to continue from."]
    wrong = [token for token in ids if type(token) is not int]
    if wrong:
        return [f"the prompt holds {wrong[0]!r}: token ids are whole numbers."]
    problems = []
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        problems.append(f"the prompt holds token {outside[0]}: the vocabulary has 0 to {vocab_size - 1}.")
    adds_nothing = request.hidden or request.max_new_tokens == 0
    if len(ids) > limit or (len(ids) == limit and not adds_nothing):
        problems.append(
            f"the prompt has {len(ids)} tokens and the model {limit} positions "
            "(max_position_embeddings, or what the cache's memory holds): shorten the prompt, nothing "
            "can follow it."
        )
    return problems


def _source_problems(source: Sequence[int], vocab_size: int, limit: int) -> list[str]:
    """What is wrong with what an encoder-decoder is to read; it has as much room as what is written."""
    reading = GenerationRequest(source, hidden=True)
    return _prompt_problems(reading, vocab_size, limit)


def _length_problems(request: GenerationRequest) -> list[str]:
    problems = []
    length, longest, new = len(request.prompt_ids), request.max_length, request.max_new_tokens
    scores_only = request.prompt_logprobs is not None or request.hidden
    least_new = 0 if scores_only else 1
    for name, value, least in (
        ("max_new_tokens", new, least_new),
        ("max_length", longest, 1),
        ("min_new_tokens", request.min_new_tokens, 0),
        ("stream", request.stream, 0),
    ):
        if value is not None and (type(value) is not int or value < least):
            problems.append(f"{name} is {value!r}: it must be a whole number, at least {least}.")
    if problems:
        return problems
    if longest is not None and length >= longest and not request.hidden:
        problems.append(
            f"the prompt has {length} tokens already and max_length is {longest}, which counts "
            "prompt and continuation together: raise it, or give max_new_tokens instead."
        )
    if new is not None and request.min_new_tokens > new:
        problems.append(
            f"min_new_tokens is {request.min_new_tokens} and max_new_tokens is {new}: "
            "the least cannot be above the most."
        )
    return problems


def _other_problems(request: GenerationRequest, vocab_size: int, has_text: bool) -> list[str]:
    problems = []
    for name, count in (("logprobs", request.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if count is not None and not 0 <= count <= min(vocab_size, MOST_LOGPROBS):
            most = min(vocab_size, MOST_LOGPROBS)
            problems.append(f"{name} is {count}: it must be between 0 and {most}.")
    deadline = request.deadline_seconds
    if deadline is not None and (math.isnan(deadline) or deadline <= 0):
        problems.append(f"deadline_seconds is {deadline}: it must be above 0.")
    if isinstance(request.stop, str) or not all(isinstance(stop, str) and stop for stop in request.stop):
        problems.append(f"stop is {request.stop!r}: it must be a list of texts that are not empty.")
    elif request.stop and not has_text:
        problems.append("stop strings need a tokenizer, and the engine has none: use end_ids.")
    return (
        problems
        + _foreign_tokens("end_ids", list(request.end_ids), vocab_size)
        + _bias(request, vocab_size)
    )


def _bias(request: GenerationRequest, vocab_size: int) -> list[str]:
    return _foreign_tokens("logit_bias", [token for token, _ in request.rules.logit_bias], vocab_size)


def _foreign_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> list[str]:
    outside = [token for token in tokens if type(token) is not int or not 0 <= token < vocab_size]
    if not outside:
        return []
    return [f"{name} names token {outside[0]!r}: the vocabulary has 0 to {vocab_size - 1}."]
