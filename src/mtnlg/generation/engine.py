"""The generation engine: many requests, one model, one step at a time.

Each step takes in what has arrived, gives every running request one share of work (the next piece of
its prompt, or its next token), runs the model over all shares at once, chooses tokens and files them.
Requests join and leave between any two steps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mtnlg.config import ConfigError
from mtnlg.config.errors import MtnlgError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.request import (
    DEFAULT_NEW_TOKENS,
    FinishReason,
    Generation,
    GenerationRequest,
    TokenEvent,
)
from mtnlg.generation.runner import PlainRunner, Row, Runner
from mtnlg.generation.sampler import SamplingState, sample
from mtnlg.generation.text import IncrementalDecoder
from mtnlg.model import MegatronLmDecoder

Decode = Callable[[list[int]], str]


class QueueFullError(MtnlgError):
    """The engine has as many requests waiting as it may."""


@dataclass
class EngineStatistics:
    """What the engine is doing and has done.

    Args:
        running: requests that generate now.
        waiting: requests in the queue.
        finished: requests that ended, whatever the reason.
        prompt_tokens: prompt tokens taken in.
        cached_tokens: of these, found in the prefix cache.
        new_tokens: tokens generated.
        cache_tokens: tokens whose keys and values are held.
        cache_capacity: tokens there is memory for.
        steps: steps done.
        step_seconds: time spent in them.
        model_seconds: of this, in the model's forward pass.
    """

    running: int = 0
    waiting: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    cache_tokens: int = 0
    cache_capacity: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    model_seconds: float = 0.0


@dataclass
class Running:
    """A request while the engine works on it."""

    generation: Generation
    max_length: int
    state: SamplingState
    decoder: IncrementalDecoder | None
    submitted: float
    pages: list[int] = field(default_factory=list)
    num_held: int = 0  # tokens whose keys and values are in the pages
    is_cancelled: bool = False

    @property
    def ids(self) -> list[int]:
        """The prompt and the tokens chosen so far."""
        return [*self.generation.request.prompt_ids, *self.state.new_ids]


class Engine:
    """Continues many prompts at once.

    Without :meth:`start` nothing runs by itself: whoever waits for a generation drives the steps, all
    in one thread. After :meth:`start` a thread of the engine's own does them.

    Args:
        model: the decoder.
        decode: ids to text, for ``text`` and stop strings; ``None`` gives ids only.
        config: settings.
        runner: runs the model; ``None`` makes one that fits the model and the settings.
    """

    def __init__(
        self,
        model: MegatronLmDecoder,
        decode: Decode | None = None,
        config: EngineConfig | None = None,
        runner: Runner | None = None,
    ) -> None:
        self.decode = decode
        self.config = config or EngineConfig()
        self.runner = runner or _make_runner(model, self.config)
        self.statistics = EngineStatistics(cache_capacity=self.runner.num_pages * self.runner.page_size)
        self._books = PageBooks(self.runner.num_pages, self.runner.page_size)
        self._waiting: deque[Running] = deque()
        self._running: list[Running] = []
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._is_closing = False

    # -- requests

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request in the queue.

        Raises:
            ConfigError: the request cannot be answered; all that is wrong with it is named.
            QueueFullError: too many are waiting.
        """
        max_length = self._check(request)
        drive = None if self._thread is not None else self.step
        generation = Generation(request, drive, self._cancel)
        decoder = None if self.decode is None else IncrementalDecoder(self.decode, request.prompt_ids)
        entry = Running(
            generation, max_length, SamplingState.of_request(request), decoder, time.monotonic()
        )
        with self._wake:
            if len(self._waiting) >= self.config.max_queue_size + self.config.max_batch_size:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already: try again later.")
            self._waiting.append(entry)
            self._wake.notify_all()
        return generation

    def _check(self, request: GenerationRequest) -> int:
        """The total length at which the request ends."""
        length = len(request.prompt_ids)
        if not length:
            raise ConfigError("the prompt is empty: give at least one token to continue from.")
        if length >= self.runner.max_length:
            raise ConfigError(f"the prompt has {length} tokens and the model {self.runner.max_length}.")
        ends = [self.runner.max_length]
        if request.max_length is not None:
            ends.append(request.max_length)
        if request.max_new_tokens is not None or request.max_length is None:
            wanted = request.max_new_tokens
            ends.append(length + (DEFAULT_NEW_TOKENS if wanted is None else wanted))
        return min(ends)

    def _cancel(self, generation: Generation) -> None:
        with self._wake:
            for entry in [*self._waiting, *self._running]:
                if entry.generation is generation:
                    entry.is_cancelled = True
            self._wake.notify_all()

    # -- steps

    def step(self) -> bool:
        """Do one step.

        Returns:
            Whether there was anything to do.
        """
        began = time.perf_counter()
        self._drop_those_given_up()
        self._admit()
        if not self._running:
            return False
        shares = [(entry, self._share(entry)) for entry in self._running]
        model_began = time.perf_counter()
        logits = self.runner.run([row for _, row in shares])
        self.statistics.model_seconds += time.perf_counter() - model_began
        for entry, row in shares:
            entry.num_held += len(row.ids)
        choosing = [entry for entry, row in shares if row.num_logits]
        for entry, sampled in zip(choosing, sample(logits, [entry.state for entry in choosing])):
            self._take(entry, sampled.token, sampled.logprobs)
        self.statistics.steps += 1
        self.statistics.step_seconds += time.perf_counter() - began
        return True

    def _admit(self) -> None:
        with self._wake:
            while self._waiting and len(self._running) < self.config.max_batch_size:
                pages = self._books.take(self._books.pages_for(self._waiting[0].max_length))
                if pages is None:
                    break
                entry = self._waiting.popleft()
                entry.pages = pages
                entry.generation.usage.queue_seconds = time.monotonic() - entry.submitted
                self.statistics.prompt_tokens += len(entry.generation.request.prompt_ids)
                self._running.append(entry)
            self._count()

    def _share(self, entry: Running) -> Row:
        new = entry.ids[entry.num_held : entry.num_held + self.config.prefill_chunk]
        is_last = entry.num_held + len(new) == len(entry.ids)
        return Row(new, entry.num_held, entry.pages, num_logits=1 if is_last else 0)

    def _take(self, entry: Running, token: int, logprobs: object) -> None:
        entry.state.accept(token)
        usage = entry.generation.usage
        usage.new_tokens += 1
        self.statistics.new_tokens += 1
        if usage.new_tokens == 1:
            usage.first_token_seconds = time.monotonic() - entry.submitted
        reason: FinishReason | None = None
        if token in entry.generation.request.end_ids:
            reason = "end"
        elif len(entry.ids) >= entry.max_length:
            reason = "length"
        text = "" if entry.decoder is None or reason == "end" else entry.decoder.push(token)
        self._file(entry, TokenEvent(token, text, logprobs, reason))  # type: ignore[arg-type]

    def _file(self, entry: Running, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            entry.generation.usage.total_seconds = time.monotonic() - entry.submitted
            self._books.give_back(entry.pages)
            self._running = [other for other in self._running if other is not entry]
            self.statistics.finished += 1
            self._count()
        entry.generation.put(event)

    def _drop_those_given_up(self) -> None:
        now = time.monotonic()
        with self._wake:
            given_up: list[tuple[Running, FinishReason]] = []
            for entry in [*self._waiting, *self._running]:
                limit = entry.generation.request.deadline_seconds
                if entry.is_cancelled:
                    given_up.append((entry, "cancelled"))
                elif limit is not None and now - entry.submitted >= limit:
                    given_up.append((entry, "deadline"))
            gone = {id(entry) for entry, _ in given_up}
            self._waiting = deque(entry for entry in self._waiting if id(entry) not in gone)
        for entry, reason in given_up:
            self._file(entry, TokenEvent(None, finish_reason=reason))

    def _count(self) -> None:
        self.statistics.running, self.statistics.waiting = len(self._running), len(self._waiting)
        held = self.runner.num_pages - self._books.num_free
        self.statistics.cache_tokens = held * self.runner.page_size

    # -- the engine's own thread

    def start(self) -> Engine:
        """Run steps in a thread of the engine's own, until :meth:`close`."""
        self._thread = threading.Thread(target=self._run, name="mtnlg-engine", daemon=True)
        self._thread.start()
        return self

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stop: running and waiting requests may finish for so long, then they are cancelled."""
        end = time.monotonic() + drain_seconds
        while (self._running or self._waiting) and time.monotonic() < end and self._thread is not None:
            time.sleep(0.01)
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        for entry in [*self._running, *self._waiting]:
            entry.is_cancelled = True
        self._drop_those_given_up()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._is_closing or self._waiting or self._running):
                    self._wake.wait()
                if self._is_closing:
                    return
            self.step()


def _make_runner(model: MegatronLmDecoder, config: EngineConfig) -> Runner:
    per_request = -(-model.config.max_position_embeddings // 16)
    return PlainRunner(model, per_request * config.max_batch_size)
