"""The app: which path is answered by what."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

import pydantic_core
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from mtnlg import __version__
from mtnlg.serving import descriptions
from mtnlg.serving.adapters import add_adapter, remove_adapter
from mtnlg.serving.chat import create_chat_completion
from mtnlg.serving.completions import create_completion
from mtnlg.serving.embeddings import create_embedding
from mtnlg.serving.errors import ApiError, invalid, of_validation, unknown_url, wrong_method
from mtnlg.serving.gate import Gate
from mtnlg.serving.page_routes import add_page_routes
from mtnlg.serving.probes import health, list_models, metrics, ready, retrieve_model
from mtnlg.serving.state import ServerState
from mtnlg.serving.tokenize import detokenize, tokenize, tokenizer_info

POSTS: Sequence[tuple[str, Callable[..., Any]]] = (
    ("/v1/completions", create_completion),
    ("/v1/chat/completions", create_chat_completion),
    ("/v1/embeddings", create_embedding),
    ("/v1/adapters", add_adapter),
    ("/v1/tokenize", tokenize),
    ("/v1/detokenize", detokenize),
    ("/tokenize", tokenize),  # as lm_eval and vLLM call them
    ("/detokenize", detokenize),
)
GETS: Sequence[tuple[str, Callable[..., Any]]] = (
    ("/v1/models", list_models),
    ("/v1/models/{model:path}", retrieve_model),
    ("/tokenizer_info", tokenizer_info),
    ("/health", health),
    ("/ready", ready),
    ("/metrics", metrics),
)


# Headers of answers that a page of another origin may read.
EXPOSED = (
    "x-request-id",
    "x-context-notice",
    "openai-processing-ms",
    "Retry-After",
    "retry-after-ms",
    *(f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")),
    *(f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")),
)


def make_app(state: ServerState, lifespan: Any = None) -> FastAPI:
    """The ASGI app.

    Args:
        state: the server's; its model may come later.
        lifespan: what to do at the start and at the end.
    """
    app = FastAPI(
        title="mtnlg serve",
        version=__version__,
        description=descriptions.ABOUT,
        docs_url=None,  # the usual page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.server = state
    app.router.route_class = JsonRoute
    for path, answer in POSTS:
        app.post(path, **descriptions.of(path), include_in_schema=path.startswith("/v1"))(answer)
    app.delete("/v1/adapters/{name}", **descriptions.of("/v1/adapters/{name}"))(remove_adapter)
    for path, answer in GETS:
        app.get(path, **descriptions.of(path))(answer)
    if state.config.page:
        add_page_routes(app)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.user_middleware = list(_middleware(app, state))
    return app


def _middleware(app: FastAPI, state: ServerState) -> list[Middleware]:
    paths = frozenset(path for route in app.routes if (path := getattr(route, "path", None)))
    gate = Middleware(Gate, state=state, paths=paths)  # type: ignore[arg-type]
    if not state.config.allow_origins:
        return [gate]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(state.config.allow_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
        expose_headers=EXPOSED,
    )
    return [cors, gate]


class JsonRequest(Request):
    """Reads a body as JSON as strictly as the standard is.

    ``known_fields`` leaves others out; ``None`` keeps all.
    """

    known_fields: Collection[str] | None = None

    async def json(self) -> Any:
        """The body.

        Raises:
            ApiError: 400: it is no JSON, or no UTF-8.
        """
        if not hasattr(self, "_json"):
            try:
                self._json = pydantic_core.from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                message = f"We could not parse the JSON body of your request: {error}."
                raise invalid(message, code="invalid_json") from error
            if self.known_fields is not None and isinstance(self._json, dict):
                self._json = {name: self._json[name] for name in self.known_fields if name in self._json}
        return self._json


class JsonRoute(APIRoute):
    """A route that takes JSON only."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        answer = super().get_route_handler()
        body: Any = None if self.body_field is None else self.body_field.field_info.annotation

        async def handle(request: Request) -> Response:
            parsed = JsonRequest(request.scope, request.receive)
            if body is not None:
                _check_media_type(request.headers.get("content-type", ""))
                _check_coding(request.headers.get("content-encoding", "identity"))
                if request.app.state.server.config.ignore_unknown_fields:
                    parsed.known_fields = body.model_fields
            return await answer(parsed)

        return handle


def _check_media_type(content_type: str) -> None:
    media_type, _, parameters = content_type.partition(";")
    if media_type.strip().lower() != "application/json":
        message = "The body must be JSON: send the header 'Content-Type: application/json'."
        raise ApiError(415, message, code="unsupported_media_type")
    charset = parameters.lower().partition("charset=")[2].strip(" \"'")
    if charset and charset not in ("utf-8", "utf8"):
        raise ApiError(415, "The body must be UTF-8.", code="unsupported_media_type")


def _check_coding(coding: str) -> None:
    if coding.strip().lower() != "identity":
        message = f"The body comes as '{coding[:40]}': send it as it is, without Content-Encoding."
        headers = {"Accept-Encoding": "identity"}
        raise ApiError(415, message, code="unsupported_content_encoding", headers=headers)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    is_unknown = lambda found: found["type"] == "extra_forbidden" and len(found["loc"]) == 2  # noqa: E731
    problems = sorted(error.errors(), key=lambda found: not is_unknown(found))
    return of_validation(problems, descriptions.FIELDS).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, or another method."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.scope["path"]
    if error.status_code == 405:
        return wrong_method(method, path, _allowed(request)).response()
    if error.status_code == 404:
        known = [route.path for route in request.app.routes if "{" not in route.path]
        return unknown_url(method, path, known).response()
    return ApiError(error.status_code, str(error.detail)).response()


def _allowed(request: Request) -> str:
    """Methods of the path."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] != Match.NONE:
            found |= getattr(route, "methods", None) or set()
    if "GET" in found:
        found.add("HEAD")
    return ", ".join(sorted(found))
