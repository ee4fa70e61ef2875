"""The server's life: the port first, the model next, and at the end no answer is left half said."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from mtnlg.config.serving import ServerConfig
from mtnlg.serving.app import make_app
from mtnlg.serving.backend import Backend
from mtnlg.serving.keys import Keys
from mtnlg.serving.logs import log
from mtnlg.serving.metrics import Metrics
from mtnlg.serving.port import listen
from mtnlg.serving.protocol import make_protocol
from mtnlg.serving.state import ServerState

TICK_SECONDS = 0.02
CUT_SECONDS = 5.0  # what answers that were given up may take to say so


class Server:
    """Serves a model until it is told to stop.

    Args:
        config: settings.
        open_backend: loads the model; runs in a thread while the port answers already.
        listener: of :func:`listen`; ``None`` makes one.

    Raises:
        ConfigError: the key file is not what it should be.
        PortError: the address is taken.
    """

    def __init__(
        self,
        config: ServerConfig,
        open_backend: Callable[[], Backend],
        listener: socket.socket | None = None,
    ) -> None:
        self.config = config
        self.state = ServerState(config, Keys.of_config(config), Metrics())
        self._open_backend = open_backend
        self._failure: BaseException | None = None
        self._num_signals = 0
        self._socket = listener or listen(config)
        self.host, self.port = self._socket.getsockname()[:2]
        self._uvicorn = _Uvicorn(self._uvicorn_config(), self._on_signal)

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve; returns when the server has stopped.

        Raises:
            MtnlgError: the model cannot be loaded.
        """
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._socket.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begin to stop, from any thread: running answers are finished first."""
        self._num_signals = max(1, self._num_signals)

    # -- inside

    def _uvicorn_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            make_app(self.state, self._lifespan),
            http=make_protocol(self.config),
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=round(self.config.keep_alive_seconds),
            timeout_graceful_shutdown=round(CUT_SECONDS),
        )

    def _on_signal(self) -> None:
        self._num_signals += 1

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        loader = threading.Thread(
            target=self._load, args=(asyncio.get_running_loop(),), name="mtnlg-load", daemon=True
        )
        loader.start()
        keeper = asyncio.create_task(self._keep())
        log("listening", url=self.url)
        try:
            yield
        finally:
            keeper.cancel()
            if self.state.is_open:
                await asyncio.to_thread(self.state.backend.close)
            log("stopped")

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        began = time.monotonic()
        try:
            backend = self._open_backend()
            backend.engine.start()
            loop.call_soon_threadsafe(self._loaded, backend, time.monotonic() - began)
        except BaseException as error:
            self._failure = error

    def _loaded(self, backend: Backend, seconds: float) -> None:
        self.state.open(backend)
        facts = {"model": backend.name, "url": self.url, "seconds": round(seconds, 2)}
        facts["kernels"] = "compiled" if backend.has_compiled_kernels else "plain"
        log("ready", **facts, max_model_len=backend.engine.max_length, format=backend.form.explanation)

    async def _keep(self) -> None:
        """Watch for what ends the server."""
        while not self._num_signals and self._failure is None:
            await asyncio.sleep(TICK_SECONDS)
        if self._failure is None:
            await self._drain()
        self._uvicorn.should_exit = True

    async def _drain(self) -> None:
        """Finish what runs; a second signal, or too long a time, gives it up."""
        self.state.drain()
        seconds = self.config.drain_timeout_seconds
        log("draining", running=self.state.num_busy, seconds=seconds)
        ends = time.monotonic() + seconds
        while self.state.num_busy and time.monotonic() < ends and self._num_signals < 2:
            await asyncio.sleep(TICK_SECONDS)
        if self.state.num_busy and self.state.is_open:
            log("giving_up", logging.WARNING, running=self.state.num_busy)
            await asyncio.to_thread(self.state.backend.engine.close)
            ends = time.monotonic() + CUT_SECONDS
            while self.state.num_busy and time.monotonic() < ends:
                await asyncio.sleep(TICK_SECONDS)


class _Uvicorn(uvicorn.Server):
    """uvicorn, with signals handed to us and quicker at the end."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        # A terminal that closes ends its server as gently, unless it was started with nohup.
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
            numbers.append(hang_up)
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self._on_signal()


def serve(
    config: ServerConfig, open_backend: Callable[[], Backend], listener: socket.socket | None = None
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; logs go to stderr.

    Raises:
        MtnlgError: see :class:`Server`.
    """
    server = Server(config, open_backend, listener)
    if not _is_local(server.host) and server.state.keys.is_open:
        log(
            "open_to_everybody",
            logging.WARNING,
            advice="there is no API key: give --api-key-file, or --host 127.0.0.1",
        )
    server.run()


def _is_local(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"
