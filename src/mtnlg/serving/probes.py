"""Paths without work: which models there are, and how the server is."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.dialogue_format import TemplateFormat
from mtnlg.serving.metrics import CONTENT_TYPE
from mtnlg.serving.state import ServerState, state_of


async def list_models(request: Request) -> JSONResponse:
    """The models that can be asked: the one, and it with each of its adapters."""
    state = state_of(request)
    state.check_ready()
    adapters = state.backend.engine.adapters.loaded
    data = [described(state), *(described(state, adapter) for adapter in adapters)]
    return JSONResponse({"object": "list", "data": data})


async def retrieve_model(model: str, request: Request) -> JSONResponse:
    """What is known of a model."""
    state = state_of(request)
    state.check_ready()
    return JSONResponse(described(state, state.chosen_adapter(model)))


def described(state: ServerState, adapter: LoadedAdapter | None = None) -> dict[str, Any]:
    """The model, with an adapter or without, as the API shows it."""
    backend = state.backend
    return {
        "id": backend.name if adapter is None else adapter.name,
        "object": "model",
        "created": backend.created if adapter is None else adapter.loaded,
        "owned_by": "mtnlg",
        "parent": None if adapter is None else backend.name,
        "max_model_len": state.longest(adapter),
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
