"""Patience with connections: for headers, for readers, and how many there may be.

uvicorn has no limit for these, so one slow or endless client could hold a connection for ever.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mtnlg.config.serving import ServerConfig
from mtnlg.serving.errors import SERVER_ERROR, ApiError

REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def make_protocol(config: ServerConfig) -> type[asyncio.Protocol]:
    """The class of connections under these settings."""
    return type("Connection", (_Connection,), {"settings": config})


class _Connection(HttpToolsProtocol):
    settings: ServerConfig
    _header_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _num_header_bytes = 0
    _has_headers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(
                ApiError(
                    503,
                    "Too many connections are open. Try again later.",
                    code="too_many_connections",
                    kind=SERVER_ERROR,
                    headers={"Retry-After": "1"},
                )
            )
            return
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    # -- headers

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._header_timer is None and not self._is_in_request():
            self._wait_for_headers()
        if not self._has_headers:
            self._num_header_bytes += len(data)
        super().data_received(data)
        if not self._has_headers and self._num_header_bytes > self.settings.max_header_bytes:
            self._refuse_headers()

    def on_message_begin(self) -> None:
        self._has_headers = False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._has_headers, self._num_header_bytes = True, 0
        self._stop_header_timer()
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.settings.max_header_bytes:
            self._refuse_headers()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_headers = False
        if not self.transport.is_closing():
            super().on_message_complete()

    def _should_upgrade(self) -> bool:
        return False  # there is nothing else to speak here: the request is answered as it is

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)

    def _is_in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_headers(self) -> None:
        self._header_timer = self.loop.call_later(
            self.settings.header_timeout_seconds, self._headers_are_late
        )

    def _headers_are_late(self) -> None:
        self._header_timer = None
        message = f"The headers did not arrive within {self.settings.header_timeout_seconds:g} seconds."
        self._refuse(ApiError(408, message, code="request_timeout"))

    def _refuse_headers(self) -> None:
        message = f"The headers are larger than {self.settings.max_header_bytes} bytes."
        self._refuse(ApiError(431, message, code="headers_too_large"))

    # -- readers

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.settings.send_timeout_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None
        super().resume_writing()

    # -- answers without the app

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _refuse(self, error: ApiError) -> None:
        self._stop_timers()
        if self.transport.is_closing():
            return
        body = json.dumps(error.body).encode()
        headers: dict[str, Any] = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
            **(error.headers or {}),
        }
        lines = [f"HTTP/1.1 {error.status_code} {REASONS[error.status_code]}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_timers(self) -> None:
        self._stop_header_timer()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> Any:
    """The app for HTTP/1.0, which knows no chunks: an answer of unknown length ends with its connection."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_as_it_is(message: Message) -> None:
            if message["type"] == "http.response.start":
                cycle.chunked_encoding = False
            else:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_as_it_is)

    return answer
