"""``POST /v1/embeddings``: the mean of a text's hidden states, of length 1."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mtnlg.generation.request import GenerationRequest
from mtnlg.serving.errors import failed, invalid
from mtnlg.serving.jobs import Job
from mtnlg.serving.prompts import check_count, check_lengths, off_the_loop, prompt_rows
from mtnlg.serving.schemas import EmbeddingRequest
from mtnlg.serving.state import state_of, visit_of
from mtnlg.serving.streaming import finish


async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors for one or more texts."""
    state, visit = state_of(request), visit_of(request)
    adapter = state.chosen_adapter(body.model)
    size = state.backend.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        message = f"Invalid 'dimensions': this model's vectors have {size} numbers, not {body.dimensions}."
        raise invalid(message, "dimensions", "integer_above_max_value")
    _texts, rows = await prompt_rows(state, body.input, "input", add_special=False, parse_special=False)
    check_count(state, len(rows), "input")
    check_lengths(state, rows, 0, "input")
    limit = state.config.request_timeout_seconds or None
    name = None if adapter is None else adapter.name
    requests = [GenerationRequest(ids, hidden=True, deadline_seconds=limit, adapter=name) for ids in rows]
    job = Job(state, visit, requests)
    await finish(request, job)
    states = [generation.hidden for generation in job.generations]
    if any(found is None for found in states):
        raise failed(visit.request_id)
    vectors = await off_the_loop(
        state, lambda: [pooled(found.numpy(), body.dimensions) for found in states if found is not None]
    )
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": job.prompt_tokens, "total_tokens": job.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})


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
