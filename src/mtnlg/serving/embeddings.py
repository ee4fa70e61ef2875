"""``POST /v1/embeddings``: the mean of a text's hidden states, of length 1."""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mtnlg.generation.request import GenerationRequest
from mtnlg.serving.errors import failed, invalid
from mtnlg.serving.jobs import Job
from mtnlg.serving.prompts import check_lengths, is_one, off_the_loop, prompt_rows
from mtnlg.serving.schemas import EmbeddingRequest
from mtnlg.serving.state import state_of, visit_of
from mtnlg.serving.streaming import finish

MOST_INPUTS = 2048  # OpenAI's


async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors for one or more texts."""
    state, visit = state_of(request), visit_of(request)
    adapter = state.chosen_adapter(body.model)
    size = state.backend.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = f"Invalid 'dimensions': this model's vectors have {size} numbers, not {body.dimensions}."
        raise invalid(message, "dimensions", "integer_above_max_value")
    if not is_one(body.input) and len(body.input) > MOST_INPUTS:
        message = f"Invalid 'input': {len(body.input)} texts. Send at most {MOST_INPUTS} at a time."
        raise invalid(message, "input", "array_above_max_length")
    _texts, rows = await prompt_rows(state, body.input, "input", add_special=False, parse_special=False)
    check_lengths(state, rows, 0, "input", adapter)
    num_tokens = sum(map(len, rows))
    visit.caller.check(num_tokens)
    vectors: list[np.ndarray] = []
    count = state.backend.engine.config.max_batch_size  # at a time: others are in the queue, too
    name = None if adapter is None else adapter.name
    for begin in range(0, len(rows), count):
        states = await _hidden_states(request, rows[begin : begin + count], name)
        vectors += await off_the_loop(state, functools.partial(_pooled_each, states, body.dimensions))
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


async def _hidden_states(
    request: Request, rows: Sequence[Sequence[int]], adapter: str | None
) -> list[np.ndarray]:
    """States of each text after the final norm [tokens, hidden]."""
    state, visit = state_of(request), visit_of(request)
    limit = state.config.request_timeout_seconds
    seconds = max(limit - visit.seconds, 0.001) if limit else None
    requests = [
        GenerationRequest(ids, hidden=True, deadline_seconds=seconds, adapter=adapter) for ids in rows
    ]
    job = Job(state, visit, requests)
    await finish(request, job)
    found = [generation.hidden.numpy() for generation in job.generations if generation.hidden is not None]
    if len(found) < len(rows):
        raise failed(visit.request_id)
    return found


def _pooled_each(states: Sequence[np.ndarray], dimensions: int | None) -> list[np.ndarray]:
    return [pooled(found, dimensions) for found in states]


def pooled(states: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """The mean over a text's tokens, cut to its first ``dimensions`` numbers, of length 1.

    Args:
        states: hidden states after the final norm [tokens, hidden].
        dimensions: how many to keep; ``None`` keeps all.
    """
    mean = states.astype(np.float64).mean(axis=0)[:dimensions]
    return (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)


def _encoded(vector: np.ndarray, form: str | None) -> str | Sequence[float]:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    found: list[float] = vector.tolist()
    return found
