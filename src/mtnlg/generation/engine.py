"""The generation engine: many requests, one model, one step at a time.

Each step takes in what has arrived, gives every running request one share of work (the next piece of
its prompt, or its next token), runs the model over all shares at once, chooses tokens and files them.
Requests join and leave between any two steps.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.errors import MtnlgError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.adapters import AdapterShelf
from mtnlg.generation.checks import check_request
from mtnlg.generation.choose_runner import make_runner
from mtnlg.generation.locks import FairLock
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.refusals import EngineClosedError as EngineClosedError
from mtnlg.generation.refusals import QueueFullError as QueueFullError
from mtnlg.generation.request import FinishReason, Generation, GenerationRequest, TokenEvent
from mtnlg.generation.runner import Runner
from mtnlg.generation.sampler import SamplingState
from mtnlg.generation.scheduler import Drafter, Running, Scheduler
from mtnlg.generation.speculation import make_drafter
from mtnlg.generation.statistics import EngineStatistics
from mtnlg.generation.step import Stepper
from mtnlg.generation.text import TextStream
from mtnlg.generation.virtual_tokens import longest_text, refuse_with_virtual_tokens
from mtnlg.model import LanguageModel, MegatronLmDecoder
from mtnlg.model.virtual_tokens import prompt_with_virtual

Decode = Callable[[list[int]], str]
LOG = logging.getLogger(__name__)
PIECE = 64  # tokens; see Scheduler's ``piece``


class Engine:
    """Continues many prompts at once.

    Without :meth:`start` nothing runs by itself: whoever waits for a generation drives the steps.
    After :meth:`start` a thread of the engine's own does them. Every method may be called from any
    thread.

    Args:
        model: the decoder, in evaluation mode.
        decode: ids to text, for ``text`` and stop strings; ``None`` gives ids only.
        config: settings.
        runner: runs the model; ``None`` makes one that fits the model and the settings.
        drafter: guesses tokens that the model then checks several at a time; ``None`` makes the one that
            ``config.speculation`` names.
        draft_model: a small model that guesses; ``None`` is the model's own ``draft_model``, if any.
        use_cache: keep keys and values; ``None`` is the model's config's.

    Attributes:
        adapters: those that requests may name.

    Raises:
        ConfigError: the settings do not fit the model or the machine.
    """

    def __init__(
        self,
        model: LanguageModel,
        decode: Decode | None = None,
        config: EngineConfig | None = None,
        runner: Runner | None = None,
        drafter: Drafter | None = None,
        draft_model: MegatronLmDecoder | None = None,
        use_cache: bool | None = None,
    ) -> None:
        self.decode = decode
        self.config = config or EngineConfig()
        self.runner = runner = runner or make_runner(model, self.config)
        self._reads_source = getattr(runner, "reads_source", False)
        draft_model = draft_model or getattr(model, "draft_model", None)
        drafter = drafter or make_drafter(self.config, runner.vocab_size, draft_model)
        capacity = runner.num_pages * runner.page_size
        # Whose virtual tokens stand with every text; before a source the runner puts them itself.
        own: AdapterConfig | None = getattr(model, "adapter", None)
        self.own_adapter = None if self._reads_source else own
        self.max_length = longest_text(self.own_adapter, min(runner.max_length, capacity))
        self.adapters = AdapterShelf(model, getattr(runner, "takes_adapters", False))
        self.statistics = EngineStatistics(cache_capacity=capacity)
        self._scheduler = Scheduler(
            PageBooks(runner.num_pages, runner.page_size),
            self.config.max_batch_size,
            self.config.prefill_chunk,
            self.config.prefix_cache and not self._reads_source,  # what is written depends on what was read
            PIECE if self.config.deterministic and not runner.is_invariant else None,
            model.config.use_cache if use_cache is None else use_cache,
            drafter,
        )
        if drafter is not None and self._scheduler.drafter is None:
            warnings.warn(
                "nothing is guessed: without a cache, or deterministic, it would not pay.", stacklevel=2
            )
        self._stepper = Stepper(runner, self._scheduler, self.statistics, self._finish)
        self._arrivals: deque[Running] = deque()
        self._given_up: deque[Running] = deque()
        self._deadlines: list[tuple[float, int, Running]] = []  # a heap
        self._numbers = itertools.count()
        self._num_present = 0  # requests that have not ended
        self._entries: dict[Generation, Running] = {}
        self._wake = threading.Condition()  # guards what other threads touch; never held in a step's work
        self._stepping = FairLock()
        self._thread: threading.Thread | None = None
        self._is_closing = False  # the thread is to stop
        self._refusal: str | None = None  # why nothing is taken in any more

    def submit(self, request: GenerationRequest) -> Generation:
        """Put a request in the queue.

        Raises:
            ConfigError: the request cannot be answered; all that is wrong with it is named.
            QueueFullError: too many are waiting.
            EngineClosedError: the engine takes nothing in any more.
        """
        request = self.with_source(request)
        max_length = self.check(request)
        generation = Generation(request, None if self._thread is not None else self.step, self._cancel)
        if request.prompt_logprobs is not None:
            generation.prompt_logprobs = []
        entry = self._make_entry(generation, max_length)
        with self._wake:
            self._refuse_if_full()
            self._num_present += 1
            self._entries[generation] = entry
            self._arrivals.append(entry)
            if (seconds := request.deadline_seconds) is not None:
                heapq.heappush(self._deadlines, (entry.submitted + seconds, next(self._numbers), entry))
            self.statistics.waiting = self._num_present - self.statistics.running
            self._wake.notify_all()
        return generation

    def check(self, request: GenerationRequest) -> int:
        """The total length at which a request would end.

        Raises:
            ConfigError: it cannot be answered; all that is wrong with it is named.
        """
        loaded, has_text = self.adapters.get(request.adapter), self.decode is not None
        refuse_with_virtual_tokens(self.own_adapter if loaded is None else loaded.adapter.config, request)
        longest, request = self.longest(request.adapter), self.with_source(request)
        return check_request(request, self.runner.vocab_size, longest, has_text)

    def longest(self, adapter: str | None = None) -> int:
        """Most tokens of prompt and continuation; ConfigError where there is no such adapter."""
        loaded = self.adapters.get(adapter)
        return self.max_length if loaded is None else longest_text(loaded.adapter.config, self.max_length)

    def with_source(self, request: GenerationRequest) -> GenerationRequest:
        """As the model takes it: an encoder-decoder reads the prompt and begins a text of its own."""
        if not self._reads_source or request.source_ids is not None:
            return request
        start = getattr(self.runner, "start_id")  # noqa: B009
        return replace(request, prompt_ids=[start], source_ids=tuple(request.prompt_ids))

    def _make_entry(self, generation: Generation, max_length: int) -> Running:
        request = generation.request
        text = None
        if self.decode is not None and not request.hidden:
            text = TextStream(
                self.decode, request.prompt_ids, request.stop, request.include_stop, request.min_new_tokens
            )
        state = SamplingState.of_request(request)
        ids = list(request.prompt_ids)
        loaded = self.adapters.get(request.adapter)
        config = self.own_adapter if loaded is None else loaded.adapter.config
        if config is not None:
            ids = prompt_with_virtual(ids, config, self.runner.vocab_size)
        max_length += len(ids) - len(request.prompt_ids)
        return Running(generation, max_length, state, text, time.monotonic(), ids=ids, adapter=loaded)

    def _refuse_if_full(self) -> None:
        if self._refusal is not None:
            raise EngineClosedError(self._refusal)
        most = self.config.max_queue_size + self.config.max_batch_size
        if self._num_present >= most:
            num_waiting = self._num_present - self.statistics.running
            raise QueueFullError(f"{num_waiting} requests are waiting already: try again later.")

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Hidden states after the last layer and the final norm.

        Args:
            ids: a text's tokens, at least one.

        Returns:
            float32 [tokens, hidden] on the CPU; an encoder-decoder's are its encoder's.

        Raises:
            ConfigError: the ids cannot be embedded.
        """
        generation = self.submit(GenerationRequest(ids, hidden=True)).result()
        if generation.hidden is None:
            raise MtnlgError(f"the embedding was not finished: {generation.finish_reason}.")
        return generation.hidden

    def forget(self) -> None:
        """The weights have changed: prepare them anew and keep nothing of earlier prompts.

        Running requests go on, with what was computed for them before.
        """
        with self._stepping:
            self._scheduler.books.forget()
            refresh = getattr(self.runner, "refresh", None)  # of runners that keep a copy of the weights
            if refresh is not None:
                refresh()

    @contextmanager
    def exclusively(self) -> Iterator[tuple[Runner, PageBooks]]:
        """The runner and its pages, with no step done while this is open: for searches.

        Open it for one run of the model at a time, so that the requests of others go on between.
        """
        with self._stepping, torch.inference_mode():
            yield self.runner, self._scheduler.books

    def _cancel(self, generation: Generation) -> None:
        with self._wake:
            entry = self._entries.get(generation)
            if entry is None or any(other is entry for other in self._given_up):
                return
            self._given_up.append(entry)
            self._wake.notify_all()
        if self._thread is None and self._stepping.try_to_enter():
            try:
                self._drop_those_given_up()
            finally:
                self._stepping.__exit__()

    # -- steps

    def step(self) -> bool:
        """Do one step.

        Returns:
            Whether there was anything to do.
        """
        with self._stepping, torch.inference_mode():
            try:
                self._take_arrivals()
                self._drop_those_given_up()
                did_something = self._stepper.step()
                self._count()
                return did_something
            except Exception as error:  # a mistake of ours: nobody may wait for an answer for ever
                LOG.exception("the generation engine stops")
                self._refuse(f"the generation engine was stopped by an error: {error!r}")
                self._end_all("error", error)
                return False
            except BaseException:  # Ctrl-C in whoever drives: the books are right, the answers lost
                self._end_all("cancelled")
                raise

    def _take_arrivals(self) -> None:
        while self._arrivals:
            entry = self._arrivals.popleft()
            if entry.generation in self._entries:  # else it was given up before it was taken in
                self._scheduler.waiting.append(entry)

    def _drop_those_given_up(self) -> None:
        self._take_arrivals()
        while self._given_up:
            self._finish(self._given_up.popleft(), "cancelled")
        if not self._deadlines:
            return
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            with self._wake:
                _at, _number, entry = heapq.heappop(self._deadlines)
            self._finish(entry, "deadline")

    def _finish(
        self,
        entry: Running,
        reason: FinishReason,
        event: TokenEvent | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End a request: its memory is free before its user hears of it. Once only."""
        generation = entry.generation
        with self._wake:
            if self._entries.pop(generation, None) is None:
                return
            self._num_present -= 1
            self._forget_old_deadlines()
            self._wake.notify_all()
        self._scheduler.remove(entry)
        generation.usage.total_seconds = time.monotonic() - entry.submitted
        generation.error = error
        statistics = self.statistics
        statistics.finished += 1
        statistics.finish_reasons[reason] = statistics.finish_reasons.get(reason, 0) + 1
        self._count()
        if event is None:
            event = TokenEvent(None, self._last_text(entry), finish_reason=reason)
        try:
            generation.put(event)
        except Exception:
            LOG.exception("a listener failed on the last event of its generation")

    def _forget_old_deadlines(self) -> None:
        """Hold no more of requests that ended in time than of those that are there."""
        if len(self._deadlines) > 2 * self._num_present + 64:
            self._deadlines = [one for one in self._deadlines if one[2].generation in self._entries]
            heapq.heapify(self._deadlines)

    def _last_text(self, entry: Running) -> str:
        return "" if entry.text is None or entry.text.is_stopped else entry.text.finish()

    def _end_all(self, reason: FinishReason, error: BaseException | None = None) -> None:
        for entry in list(self._entries.values()):
            self._finish(entry, reason, error=error)

    def _count(self) -> None:
        books, statistics = self._scheduler.books, self.statistics
        statistics.running = len(self._scheduler.running)
        statistics.waiting = max(0, self._num_present - statistics.running)
        statistics.preempted = self._scheduler.num_preempted
        statistics.cache_tokens = (books.num_pages - books.num_free) * books.page_size
        statistics.kept_tokens = books.num_kept * books.page_size

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken: neither closed nor stopped by an error of its own."""
        return self._refusal is None

    # -- the engine's own thread

    def start(self) -> Engine:
        """Run steps in a thread of the engine's own, until :meth:`close`.

        Raises:
            EngineClosedError: the engine was closed.
        """
        with self._wake:
            if self._refusal is not None:
                raise EngineClosedError(self._refusal)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mtnlg-engine", daemon=True)
                self._thread.start()
        return self

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stop: nothing more is taken in; what is there may finish for so long, then it is cancelled."""
        end = time.monotonic() + drain_seconds
        self._refuse("the generation engine is closed: it takes no more requests.")
        if self._thread is None:
            while self._num_present and time.monotonic() < end and self.step():
                pass
        else:
            with self._wake:
                self._wake.wait_for(lambda: not self._num_present, max(0.0, drain_seconds))
                self._is_closing = True
                self._wake.notify_all()
            if threading.current_thread() is not self._thread:
                self._thread.join()
        with self._stepping:
            self._take_arrivals()
            self._end_all("cancelled")

    def _refuse(self, why: str) -> None:
        with self._wake:
            self._refusal = self._refusal or why

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._is_closing or self._num_present):
                        self._wake.wait()
                    if self._is_closing:
                        return
                self.step()
        finally:  # whatever ended the thread: nobody may wait for it
            self._refuse("the generation engine's thread has ended.")
            self._end_all("cancelled")
