"""``POST /v1/completions``: continue texts or ids; with ``echo``, score them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from json.encoder import encode_basestring as quote
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mtnlg.generation.request import Generation, TokenEvent
from mtnlg.generation.samples import best_samples
from mtnlg.serving import logprobs
from mtnlg.serving.errors import invalid
from mtnlg.serving.jobs import FINISH_REASONS, Job
from mtnlg.serving.prompts import (
    base_request,
    check_count,
    check_lengths,
    constraint_of,
    is_one,
    prompt_rows,
    sequences,
    with_adapters_text,
)
from mtnlg.serving.schemas import CompletionRequest
from mtnlg.serving.state import ServerState, state_of, visit_of
from mtnlg.serving.streaming import EventStream, as_event, dumps, finish

DEFAULT_TOKENS = 16  # OpenAI's


async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts, given as text or as token ids."""
    state, visit = state_of(request), visit_of(request)
    adapter = state.chosen_adapter(body.model)
    num_tried = _check(body)
    prompt = body.prompt if adapter is None else with_adapters_text(body.prompt, adapter)
    check_count(state, (1 if is_one(prompt) else len(prompt)) * num_tried, "n")
    texts, rows = await prompt_rows(state, prompt, "prompt", body.add_special_tokens, body.parse_special)
    least = min(1, _wanted(body)) if body.max_tokens is None else _wanted(body)
    check_lengths(state, rows, least, "prompt", adapter)
    base = base_request(state, visit, body, adapter)
    base.constraint = await constraint_of(state, body)
    base.max_new_tokens = _wanted(body)
    base.logprobs = _num_logprobs(body, num_tried)
    if body.echo and body.logprobs is not None:
        base.prompt_logprobs = body.logprobs
    elif not base.max_new_tokens:
        base.prompt_logprobs = 0  # nothing else would be left to do
    if base.prompt_logprobs is not None and state.backend.reads_source:
        what = "echo" if body.echo else "max_tokens"
        message = (
            f"Invalid '{what}': this model reads a prompt and does not write it, so it cannot score it."
        )
        raise invalid(message, what, "unsupported_parameter")
    base.min_new_tokens = min(base.min_new_tokens, base.max_new_tokens)
    job = Job(state, visit, sequences(base, rows, num_tried))
    answer = Answer(state, body, job, texts, num_tried)
    if body.stream:
        return EventStream(job, visit, answer)
    await finish(request, job)
    if state.config.log_prompts:
        visit.facts |= {"prompt": texts, "answer": [found.text for found in job.generations]}
    return JSONResponse(answer.whole())


def _check(body: CompletionRequest) -> int:
    """Refuse what does not go together; how many sequences of each prompt to try."""
    if body.suffix:
        message = "Invalid 'suffix': this model only continues texts, it cannot fill gaps. Leave it out."
        raise invalid(message, "suffix", "unsupported_parameter")
    if body.stream_options is not None and not body.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise invalid(message, "stream_options", "invalid_value")
    n = body.n or 1
    if body.best_of is None:
        return n
    if body.best_of < n:
        message = f"'best_of' is {body.best_of} and 'n' {n}: more are asked for than are generated."
        raise invalid(message, "best_of", "invalid_value")
    if body.best_of > n and body.stream:
        message = "Cannot stream results with best_of > n: which are the best is known at the end."
        raise invalid(message, "best_of", "invalid_value")
    return body.best_of


def _wanted(body: CompletionRequest) -> int:
    return DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens


def _num_logprobs(body: CompletionRequest, num_tried: int) -> int | None:
    """How many alternatives; the best of several are told by the chosen tokens' own."""
    if body.logprobs is not None:
        return body.logprobs
    return 0 if num_tried > (body.n or 1) else None


class Answer:
    """Writes a completion, whole or in chunks.

    Args:
        state: the server's.
        body: the request.
        job: its sequences.
        texts: the prompts, ``None`` where they are ids.
        num_tried: sequences of each prompt.
    """

    def __init__(
        self,
        state: ServerState,
        body: CompletionRequest,
        job: Job,
        texts: Sequence[str | None],
        num_tried: int,
    ) -> None:
        self._body, self._job, self._num_tried = body, job, num_tried
        self._vocabulary = state.backend.vocabulary
        decode = state.backend.tokenizer.decode
        self._prompts = [""] * len(texts)
        if body.echo:
            self._prompts = [
                decode(job.generations[row * num_tried].request.prompt_ids) if text is None else text
                for row, text in enumerate(texts)
            ]
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": state.backend.fingerprint,
        }
        self._num_sent = [0] * len(job.generations)  # characters, where offsets are wanted
        self._has_begun = [False] * len(job.generations)
        usage = ',"usage":null' if body.stream_options and body.stream_options.include_usage else ""
        self._begin = "data: " + dumps(self._head)[:-1] + f'{usage},"choices":[{{"index":'

    # -- whole

    def whole(self) -> dict[str, Any]:
        """The answer's object."""
        chosen = self._best()
        choices = [self._choice(number, generation, row) for number, (generation, row) in enumerate(chosen)]
        return {**self._head, "choices": choices, "usage": self._job.usage()}

    def _best(self) -> list[tuple[Generation, int]]:
        """The sequences that are answered, each with the number of its prompt."""
        n, tried, found = self._body.n or 1, self._num_tried, []
        for row in range(len(self._prompts)):
            candidates = self._job.generations[row * tried : (row + 1) * tried]
            found += [(generation, row) for generation in best_samples(candidates, n)]
        return found

    def _choice(self, number: int, generation: Generation, row: int) -> dict[str, Any]:
        return {
            "index": number,
            "text": self._prompts[row] + generation.text,
            "logprobs": self._logprobs_of(generation, row),
            "finish_reason": FINISH_REASONS[generation.finish_reason or "length"],
        }

    def _logprobs_of(self, generation: Generation, row: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        tokens, found = list(generation.new_ids), list(generation.logprobs)
        if self._body.echo:
            tokens = [*generation.request.prompt_ids, *tokens]
            found = [*(generation.prompt_logprobs or ()), *found]
        offsets = self._vocabulary.offsets(tokens)
        return logprobs.legacy(self._vocabulary, tokens, found, offsets)

    # -- in chunks

    def opening(self) -> str:
        """Nothing comes before the first token: its logprobs may be asked for."""
        return ""

    def chunk(self, index: int, event: TokenEvent) -> str:
        """What an event says."""
        text, entries, tokens = event.text, [], []
        if self._body.logprobs is not None and event.logprobs is not None and event.token is not None:
            entries, tokens = [event.logprobs], [event.token]
        if self._body.echo and not self._has_begun[index]:
            generation = self._job.generations[index]
            text = self._prompts[index // self._num_tried] + text
            if self._body.logprobs is not None:
                entries = [*(generation.prompt_logprobs or ()), *entries]
                tokens = [*generation.request.prompt_ids, *tokens]
        self._has_begun[index] = True
        if not text and not entries and event.finish_reason is None:
            return ""
        found = "null"
        if entries:
            offsets = self._vocabulary.offsets(tokens, self._num_sent[index])
            found = dumps(logprobs.legacy(self._vocabulary, tokens, entries, offsets))
        self._num_sent[index] += len(text)
        reason = event.finish_reason
        ended = "null" if reason is None else quote(FINISH_REASONS.get(reason, "length"))
        return (
            f'{self._begin}{index},"text":{quote(text)},"logprobs":{found},"finish_reason":{ended}}}]}}\n\n'
        )

    def closing(self) -> str:
        """What it took, if that was asked for."""
        options = self._body.stream_options
        if options is None or not options.include_usage:
            return ""
        return as_event({**self._head, "choices": [], "usage": self._job.usage()})
