"""Answers piece by piece: server-sent events, built as text, many in one write when they come at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mtnlg.generation.request import TokenEvent
from mtnlg.serving.errors import ApiError
from mtnlg.serving.jobs import Job
from mtnlg.serving.state import Visit

DONE = "data: [DONE]\n\n"
COMMENT = ": still here\n\n"  # keeps proxies from hanging up while a request waits
COMMENT_SECONDS = 15.0
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx passes each piece on at once
}


class ChunkWriter(Protocol):
    """Turns events into chunks of one endpoint."""

    def opening(self) -> str:
        """What comes before the first token."""

    def chunk(self, index: int, event: TokenEvent) -> str:
        """What an event of a sequence says; may be empty."""

    def closing(self) -> str:
        """What comes after the last, before ``[DONE]``."""


def dumps(payload: object) -> str:
    """Compact JSON."""
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":"))


def as_event(payload: object) -> str:
    """One server-sent event."""
    return f"data: {dumps(payload)}\n\n"


@contextlib.asynccontextmanager
async def watch(receive: Receive, job: Job) -> AsyncIterator[None]:
    """Give the job up as soon as the client leaves, and at the end in any case."""

    async def wait_for_the_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        job.leave()

    watcher = asyncio.create_task(wait_for_the_end())
    try:
        yield
    finally:
        watcher.cancel()
        job.close()


async def finish(request: Request, job: Job) -> None:
    """Wait for every sequence to end, unless the client leaves.

    Raises:
        ClientGoneError: it has.
        ApiError: see :meth:`Job.events`.
    """
    async with watch(request.receive, job):
        while job.num_open:
            await job.events()


class EventStream(Response):
    """A streamed answer.

    Args:
        job: what is answered.
        visit: the request.
        writer: what to write.
        headers: beside the usual ones.
    """

    def __init__(
        self, job: Job, visit: Visit, writer: ChunkWriter, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(headers={**HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._job, self._visit, self._writer = job, visit, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        async with watch(receive, self._job):
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            with _comments(self._job):
                await self._send_chunks(send)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunks(self, send: Send) -> None:
        job, writer = self._job, self._writer
        text = writer.opening()
        try:
            while job.num_open:
                events = await job.events()
                text += "".join([writer.chunk(index, event) for index, event in events])
                if not job.num_open:
                    text += writer.closing() + DONE
                if text or not events:
                    await _send_text(send, text or COMMENT)
                text = ""
        except ApiError as error:
            self._visit.facts["failed"] = error.status_code
            await _send_text(send, text + as_event(error.body))


async def _send_text(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


@contextlib.contextmanager
def _comments(job: Job) -> Iterator[None]:
    """Let the job's events be empty every few seconds."""
    loop = asyncio.get_running_loop()
    timer: list[asyncio.TimerHandle] = []

    def tick() -> None:
        job.inbox.poke()
        timer[:] = [loop.call_later(COMMENT_SECONDS, tick)]

    timer.append(loop.call_later(COMMENT_SECONDS, tick))
    try:
        yield
    finally:
        timer[0].cancel()
