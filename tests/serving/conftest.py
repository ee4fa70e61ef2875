"""Real servers on ports of their own, with a tiny model and a runner that tests can hold."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.config.serving import ServerConfig
from mtnlg.generation.dialogue_format import choose_format
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.serving.backend import Backend
from mtnlg.serving.lifecycle import Server
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.chat_template import DEFAULT_CHAT_TEMPLATE

NAME = "tiny"
TEXT = [
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。",
    "the cat sat on the mat and the dog sat too. ",
    '{"a": 1}',
]
PATIENCE_SECONDS = 20.0


def eventually(check: Callable[[], Any], seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait until ``check`` is true; fails when it never is."""
    ends = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < ends, "it never came true"
        time.sleep(0.005)
    return found


class HeldRunner:
    """Makes the steps of a runner wait for leave, once :meth:`hold` was called; counts them."""

    def __init__(self, runner: Any) -> None:
        self._run, self._leave = runner.run, threading.Condition()
        self._num_allowed: float = float("inf")
        self.num_steps = 0
        runner.run = self.run

    def hold(self) -> None:
        with self._leave:
            self._num_allowed = 0

    def allow(self, count: float = float("inf")) -> None:
        with self._leave:
            self._num_allowed += count
            self._leave.notify_all()

    def run(self, rows: Any) -> Any:
        with self._leave:
            self._leave.wait_for(lambda: self._num_allowed > 0)
            self._num_allowed -= 1
            self.num_steps += 1
        return self._run(rows)


class Running:
    """A server in a thread, and clients of it."""

    def __init__(self, server: Server, thread: threading.Thread, runner: HeldRunner) -> None:
        self.server, self.thread, self.runner = server, thread, runner
        self.url, self.port = server.url, server.port

    @property
    def engine(self) -> Any:
        return self.server.state.backend.engine

    def openai(self, **options: Any) -> openai.OpenAI:
        defaults = {"base_url": f"{self.url}/v1", "api_key": "unused", "max_retries": 0, "timeout": 60}
        return openai.OpenAI(**{**defaults, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    made = Tokenizer.train(TEXT * 5, 340)
    made.chat_template = DEFAULT_CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> MegatronLmDecoder:
    config = MegatronModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        init_method_std=0.3,
    )
    made = MegatronLmDecoder(config)
    initialize_weights(made, config, seed=5)
    return made.eval()


@pytest.fixture(scope="session")
def start(model: MegatronLmDecoder, tokenizer: Tokenizer) -> Callable[..., Any]:
    """Start a server; a context manager of :class:`Running`."""

    @contextlib.contextmanager
    def started(engine: EngineConfig | None = None, name: str = NAME, **options: Any) -> Iterator[Running]:
        engine_config = engine or EngineConfig(max_batch_size=8, max_queue_size=64, compile="off")

        def open_backend() -> Backend:
            return Backend.of_model(model, tokenizer, name, choose_format(tokenizer), engine_config)

        config = ServerConfig(**{"port": 0, "keep_alive_seconds": 1, **options})
        server = Server(config, open_backend)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        eventually(lambda: server.state.phase == "ready")
        runner = HeldRunner(server.state.backend.engine.runner)
        try:
            yield Running(server, thread, runner)
        finally:
            runner.allow()
            server.stop()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()

    return started


@pytest.fixture(scope="module")
def running(start: Callable[..., Any]) -> Iterator[Running]:
    """A server with the usual settings, shared by a module."""
    with start() as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return running.openai()
