"""Paths without work: which models there are, and how the server is."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mtnlg.generation.dialogue_format import TemplateFormat
from mtnlg.serving.errors import unknown_model
from mtnlg.serving.metrics import CONTENT_TYPE
from mtnlg.serving.state import ServerState, state_of


async def list_models(request: Request) -> JSONResponse:
    """The models that can be asked: one."""
    state = state_of(request)
    state.check_ready()
    return JSONResponse({"object": "list", "data": [_described(state)]})


async def retrieve_model(model: str, request: Request) -> JSONResponse:
    """What is known of a model."""
    state = state_of(request)
    state.check_ready()
    if model != state.backend.name:
        raise unknown_model(model)
    return JSONResponse(_described(state))


def _described(state: ServerState) -> dict[str, Any]:
    backend = state.backend
    return {
        "id": backend.name,
        "object": "model",
        "created": backend.created,
        "owned_by": "mtnlg",
        "max_model_len": backend.engine.max_length,
        "has_chat_template": isinstance(backend.form, TemplateFormat),
    }


async def health(request: Request) -> JSONResponse:
    """Whether the process is alive: 200 while it answers at all, 503 once its engine has stopped."""
    state = state_of(request)
    is_alive = not state.is_open or state.backend.is_alive
    return JSONResponse({"status": "ok" if is_alive else "engine stopped"}, 200 if is_alive else 503)


async def ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 503 while the model is loaded and once the server goes down."""
    state = state_of(request)
    if state.phase == "ready" and state.backend.is_alive:
        return JSONResponse({"status": "ready"})
    status = state.phase if state.phase != "ready" else "engine stopped"
    return JSONResponse({"status": status}, 503, {"Retry-After": "1"})


async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(state_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})
