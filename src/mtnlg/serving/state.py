"""What the whole server knows, and what is known of one request while it is here."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request

from mtnlg.config.errors import ConfigError
from mtnlg.config.serving import ServerConfig
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.serving.backend import Backend
from mtnlg.serving.errors import unavailable, unknown_model
from mtnlg.serving.keys import Keys
from mtnlg.serving.limits import Caller
from mtnlg.serving.metrics import Metrics
from mtnlg.serving.wakeups import Wakeups

if TYPE_CHECKING:
    from mtnlg.serving.jobs import Job

Phase = Literal["loading", "ready", "draining"]
MOST_SECONDS_UNTIL_FREE = 30


class ServerState:
    """Shared by all requests.

    Args:
        config: settings.
        keys: who is let in.
        metrics: what is counted.
    """

    def __init__(self, config: ServerConfig, keys: Keys, metrics: Metrics) -> None:
        self.config, self.keys, self.metrics = config, keys, metrics
        self.phase: Phase = "loading"
        self.num_busy = 0  # requests that do work now
        self._backend: Backend | None = None
        self._wakeups: Wakeups | None = None

    def open(self, backend: Backend) -> None:
        """On the event loop: the model is there, requests are taken from now on."""
        self._backend, self._wakeups = backend, Wakeups(asyncio.get_running_loop())
        self.metrics.statistics = backend.engine.statistics
        if self.phase == "loading":
            self.phase = "ready"
            self.metrics.is_ready = True

    def drain(self) -> None:
        """Take no more requests."""
        self.phase = "draining"
        self.metrics.is_ready = False

    def check_ready(self) -> None:
        """Raise ApiError 503 unless requests are taken."""
        if self.phase == "loading":
            raise unavailable("The model is still being loaded.", "model_loading", retry_after=2)
        if self.phase == "draining":
            raise unavailable("The server is shutting down.", "shutting_down", retry_after=5)

    @property
    def is_open(self) -> bool:
        """Whether the model is there."""
        return self._backend is not None

    @property
    def backend(self) -> Backend:
        """The model; :meth:`check_ready` comes first."""
        assert self._backend is not None
        return self._backend

    @property
    def wakeups(self) -> Wakeups:
        """From the engine's thread to the loop."""
        assert self._wakeups is not None
        return self._wakeups

    def chosen_adapter(self, name: str | None) -> LoadedAdapter | None:
        """The adapter that requests for the model ``name`` mean; ``None`` for the model itself.

        Raises:
            ApiError: 404: there is no model of this name.
        """
        if name is None or name == self.backend.name:
            return None
        try:
            return self.backend.engine.adapters.get(name)
        except ConfigError as error:
            raise unknown_model(name) from error

    def longest(self, adapter: LoadedAdapter | None) -> int:
        """Most tokens of prompt and answer: virtual tokens of an adapter take some."""
        engine = self.backend.engine
        return engine.max_length if adapter is None else engine.longest(adapter.name)

    def seconds_until_free(self) -> int:
        """When somebody who was refused should come again: about as long as the queue took of late."""
        statistics = self.backend.engine.statistics
        waits = statistics.queue_seconds
        mean = waits.sum / waits.count if waits.count else 1.0
        return max(1, min(MOST_SECONDS_UNTIL_FREE, round(mean)))


@dataclass
class Visit:
    """One request from its first line to its last byte.

    Args:
        method: of HTTP.
        path: asked for.
        client: address it came from.
        caller: whose key; ``None`` where none is needed.
        request_id: in the answer's ``x-request-id`` and in the log.
        arrived: on the monotonic clock.
        status: of the answer, 0 before it is known.
        is_gone: the client has left.
        facts: more for the log.
    """

    method: str
    path: str
    client: str | None = None
    known_caller: Caller | None = None
    request_id: str = field(default_factory=lambda: f"req_{secrets.token_hex(12)}")
    arrived: float = field(default_factory=time.monotonic)
    status: int = 0
    is_gone: bool = False
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def caller(self) -> Caller:
        """Whose request it is."""
        assert self.known_caller is not None
        return self.known_caller

    @property
    def seconds(self) -> float:
        """Since arrival."""
        return time.monotonic() - self.arrived

    def note_usage(self, job: Job) -> None:
        """Keep for the log what a job took."""
        usages = [generation.usage for generation in job.generations]
        if not usages:
            return
        self.facts |= {
            "sequences": len(usages),
            "prompt_tokens": job.prompt_tokens,
            "new_tokens": sum(usage.new_tokens for usage in usages),
            "cached_tokens": max(usage.cached_tokens for usage in usages),
            "queue_seconds": round(max(usage.queue_seconds for usage in usages), 4),
            "first_token_seconds": round(min(usage.first_token_seconds for usage in usages), 4),
            "finish": ",".join(sorted({str(found.finish_reason) for found in job.generations})),
        }


def state_of(request: Request) -> ServerState:
    """The server's state."""
    state: ServerState = request.app.state.server
    return state


def visit_of(request: Request) -> Visit:
    """This request's visit."""
    visit: Visit = request.scope["mtnlg.visit"]
    return visit
