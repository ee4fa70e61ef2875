"""Loading adapters while the server runs, and taking them away; with the admin key only."""

from __future__ import annotations

from pathlib import Path

from fastapi import Request
from fastapi.responses import JSONResponse

from mtnlg.config.errors import CheckpointError, ConfigError
from mtnlg.serving.errors import ApiError, invalid, unknown_model
from mtnlg.serving.logs import log
from mtnlg.serving.probes import described
from mtnlg.serving.prompts import off_the_loop
from mtnlg.serving.schemas import AdapterRequest
from mtnlg.serving.state import ServerState, state_of


async def add_adapter(body: AdapterRequest, request: Request) -> JSONResponse:
    """Load an adapter: requests may name it as their model from now on."""
    state = state_of(request)
    folder = _folder(state, body.path or body.name)
    shelf = state.backend.engine.adapters
    if body.name == state.backend.name or body.name in shelf.names:
        message = f"There is a model '{body.name}' already: remove it, or choose another name."
        raise ApiError(409, message, param="name", code="already_exists")
    try:
        loaded = await off_the_loop(state, lambda: shelf.load(body.name, folder), is_slow=True)
    except (CheckpointError, ConfigError) as error:
        raise invalid(f"Invalid 'path': {error}", "path", "invalid_adapter") from error
    log("adapter_loaded", name=body.name, folder=str(folder))
    return JSONResponse(described(state, loaded))


async def remove_adapter(name: str, request: Request) -> JSONResponse:
    """Take an adapter away: answers that began with it end with it."""
    state = state_of(request)
    try:
        state.backend.engine.adapters.remove(name)
    except ConfigError as error:
        raise unknown_model(name) from error
    log("adapter_removed", name=name)
    return JSONResponse({"id": name, "object": "model", "deleted": True})


def _folder(state: ServerState, path: str) -> Path:
    """The adapter's folder, inside of the one that the server was given.

    Raises:
        ApiError: 403: it was given none; 400: the path leads out of it, or nowhere.
    """
    if state.config.adapter_folder is None:
        message = "This server loads no adapters while it runs: start it with --adapter-folder DIR."
        raise ApiError(403, message, param="path", code="no_adapter_folder", kind="permission_error")
    base = Path(state.config.adapter_folder).resolve()
    try:
        folder = (base / path).resolve()
        is_there = folder.is_relative_to(base) and folder.is_dir()
    except (OSError, ValueError):
        is_there = False
    if not is_there:
        message = f"Invalid 'path': there is no folder {path!r} in the server's adapter folder."
        raise invalid(message, "path", "invalid_value")
    return folder
