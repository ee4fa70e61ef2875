"""Every request passes here first and last: key, limits, size and time of its body, log, counters."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtnlg.serving.errors import ApiError, body_too_large, failed, too_slow
from mtnlg.serving.jobs import ClientGoneError
from mtnlg.serving.logs import log
from mtnlg.serving.state import ServerState, Visit

PUBLIC = frozenset(("/", "/health", "/ready", "/metrics", "/openapi.json"))
PUBLIC_FOLDER = "/page/"
MODEL_FOLDER = "/v1/models/"
ADMIN_PATH = "/v1/adapters"
MOST_WASTE = 16  # times max_body_bytes: what is read and thrown away of a body that is too large
WASTE_SECONDS = 5.0


class Gate:
    """Wraps the app.

    Args:
        app: what answers.
        state: the server's.
        paths: those there are, for the counters' labels.
    """

    def __init__(self, app: ASGIApp, state: ServerState, paths: frozenset[str]) -> None:
        self._app, self._state, self._paths = app, state, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (or the server's start and end, which pass)."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        client = scope.get("client")
        visit = Visit(scope["method"], scope["path"], client[0] if client else None)
        # HEAD is GET without the body, which is left out where it is written.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "mtnlg.visit": visit}
        answer = _Answer(send, visit)
        is_inside = False
        try:
            body = _Body(scope, receive, self._state)
            is_inside = self._enter(scope, visit)
            await body.check_length()
            await self._app(scope, body.receive, answer.send)
        except (ClientGoneError, ClientDisconnect):
            visit.is_gone = True
        except Exception as error:
            await self._apologise(error, visit, scope, receive, answer)
        finally:
            if is_inside:
                visit.caller.leave()
                self._state.num_busy -= 1
            self._write_down(visit)

    def _enter(self, scope: Scope, visit: Visit) -> bool:
        """Let the request in; whether it counts as one that does work."""
        path = scope["path"]
        if path in PUBLIC or path.startswith(PUBLIC_FOLDER):
            return False
        authorization = _header(scope, b"authorization")
        if path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/"):
            visit.known_caller = self._state.keys.admin(authorization)
            self._state.check_ready()
            return False
        visit.known_caller = self._state.keys.caller(authorization)
        if scope["method"] != "POST" or path not in self._paths:
            return False
        self._state.check_ready()
        visit.known_caller.enter()
        self._state.num_busy += 1
        return True

    async def _apologise(
        self, error: Exception, visit: Visit, scope: Scope, receive: Receive, answer: _Answer
    ) -> None:
        if not isinstance(error, ApiError):
            facts = {"request_id": visit.request_id, "path": visit.path, "error": repr(error)}
            log("fault", logging.ERROR, **facts)
            logging.getLogger("mtnlg.serving").debug("fault", exc_info=error)
            error = failed(visit.request_id)
        if visit.status:
            visit.facts["cut"] = True  # the answer has begun: all that is left is to hang up
            return
        await error.response()(scope, receive, answer.send)

    def _write_down(self, visit: Visit) -> None:
        metrics = self._state.metrics
        if visit.is_gone:
            metrics.disconnects.inc()
        label = self._label(visit.path)
        status = "disconnected" if visit.is_gone and not visit.status else str(visit.status)
        metrics.requests.labels(label, status).inc()
        metrics.request_seconds.labels(label).observe(visit.seconds)
        if visit.path in ("/health", "/ready", "/metrics"):
            return  # asked every few seconds
        log(
            "request",
            request_id=visit.request_id,
            method=visit.method,
            path=visit.path[:200],
            status=visit.status or None,
            seconds=round(visit.seconds, 4),
            client=visit.client,
            key=visit.known_caller.name if visit.known_caller else None,
            disconnected=True if visit.is_gone else None,
            **visit.facts,
        )

    def _label(self, path: str) -> str:
        if path.startswith(MODEL_FOLDER):
            return f"{MODEL_FOLDER}{{model}}"
        if path.startswith(f"{ADMIN_PATH}/"):
            return f"{ADMIN_PATH}/{{name}}"
        return path if path in self._paths else "other"


class _Answer:
    """Sends on, with the headers that every answer has."""

    def __init__(self, send: Send, visit: Visit) -> None:
        self._send, self._visit = send, visit

    async def send(self, message: Message) -> None:
        visit = self._visit
        if message["type"] == "http.response.start":
            visit.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", visit.request_id.encode()),
                (b"openai-processing-ms", str(round(1000 * visit.seconds)).encode()),
                *(visit.known_caller.headers() if visit.known_caller else ()),
            ]
        await self._send(message)


class _Body:
    """Hands the body on while it is not too large and comes in time."""

    def __init__(self, scope: Scope, receive: Receive, state: ServerState) -> None:
        self._scope, self._receive = scope, receive
        self._limit = state.config.max_body_bytes
        self._seconds = state.config.body_timeout_seconds
        self._ends = time.monotonic() + self._seconds
        self._num_bytes, self._is_whole = 0, False

    async def check_length(self) -> None:
        """Refuse a body that says itself that it is too large."""
        length = _header(self._scope, b"content-length")
        if length is not None and length.isdigit() and int(length) > self._limit:
            await self._waste()
            raise body_too_large(self._limit)

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()  # waits for the client to leave
        message = await self._next()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._limit:
                await self._waste()
                raise body_too_large(self._limit)
            self._is_whole = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout(self._ends - time.monotonic()):
                return await self._receive()
        except TimeoutError as error:
            raise too_slow(self._seconds) from error

    async def _waste(self) -> None:
        """Read on for a while: who is hung up on while writing never reads why."""
        if _header(self._scope, b"expect") is not None:
            return  # has not begun to write
        ends = time.monotonic() + min(WASTE_SECONDS, self._seconds)
        num_bytes = 0
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                while num_bytes < MOST_WASTE * self._limit:
                    message = await self._receive()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
