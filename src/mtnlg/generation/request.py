"""What is asked of the engine and what it gives back: a request, its tokens, its end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from mtnlg.generation.constraint import Constraint
from mtnlg.generation.sampling import SamplingRules

DEFAULT_NEW_TOKENS = 64

# end: an end token; stop: a stop string, or a finished constraint; length: the limit asked for or the
# model's; cancelled, deadline, error: as they say.
FinishReason = Literal["end", "stop", "length", "cancelled", "deadline", "error"]


@dataclass
class GenerationRequest:
    """One prompt and how to continue it.

    Args:
        prompt_ids: tokens to continue, at least one.
        rules: how tokens are drawn; greedy by default. ``rules.seed`` makes the draws repeatable.
        max_new_tokens: tokens of the continuation (64 if neither this nor ``max_length`` is given).
        max_length: total tokens of prompt and continuation, as in transformers. With both given the
            smaller end counts. Never past the model's ``max_position_embeddings``.
        min_new_tokens: end tokens and stop strings are out of the question before so many tokens.
        end_ids: tokens that end the sequence; they are kept as its last token, without text.
        stop: strings that end the sequence, also across token borders. Text that could still become
            one is held back; the stop string itself is never part of the text.
        include_stop: let the text end with the stop string.
        logprobs: natural-log probabilities of the chosen token and of so many most likely ones, of the
            model's distribution before any rule; ``None`` gives none.
        prompt_logprobs: the same for every token of the prompt (its first has none).
        constraint: rule that the continuation follows.
        deadline_seconds: from submission; the request then ends with what it has.
        stream: which of the seed's streams of random numbers to draw from, so that the samples of one
            prompt under one seed differ: 0, 1, 2, ...
        hidden: only take in the prompt and keep its hidden states (``Generation.hidden``); nothing is
            generated.
        source_ids: what an encoder-decoder reads; ``prompt_ids`` is then how the decoder's text begins.
            The engine makes it of a request without one: the prompt is the source.
        adapter: name of an adapter that the engine has loaded (:meth:`Engine.add_adapter`); its virtual
            tokens are put into the prompt by the engine.
    """

    prompt_ids: Sequence[int]
    rules: SamplingRules = field(default_factory=SamplingRules)
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    end_ids: Collection[int] = ()
    stop: Sequence[str] = ()
    include_stop: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None
    deadline_seconds: float | None = None
    stream: int = 0
    hidden: bool = False
    source_ids: tuple[int, ...] | None = None
    adapter: str | None = None

    @property
    def given_ids(self) -> Sequence[int]:
        """What was given to go on from: the source where there is one, else the prompt."""
        return self.prompt_ids if self.source_ids is None else self.source_ids


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely a token was, before any sampling rule.

    Args:
        logprob: of the token itself (nats); ``None`` for the first token of a prompt.
        top: (token, logprob) of the most likely ones, best first.
    """

    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One step of a generation, in the order in which things are known.

    Args:
        token: the new token; ``None`` where only text is released (the last event may do that).
        text: text that is now certain: whole characters, and no beginning of a stop string.
        logprobs: where they were asked for.
        finish_reason: set on the last event of a generation, and only there.
    """

    token: int | None
    text: str = ""
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass
class GenerationUsage:
    """What a generation took.

    Args:
        prompt_tokens: length of the prompt, or of the source.
        new_tokens: tokens generated, the end token included.
        cached_tokens: prompt tokens whose keys and values were there already.
        queue_seconds: from submission to the first step.
        first_token_seconds: from submission to the first token.
        total_seconds: from submission to the end.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


class Generation:
    """A request that the engine works on: iterate for its events, or wait for the whole.

    Events may be taken from any thread; each generation has one consumer, either an iterator or a
    listener. Where the engine has no thread of its own, whoever waits here drives it.

    Args:
        request: what was asked.
        drive: does one step of the engine, for a consumer that waits; ``None`` where it runs itself.
        cancel: tells the engine to give the request up.
    """

    def __init__(
        self,
        request: GenerationRequest,
        drive: Callable[[], object] | None = None,
        cancel: Callable[[Generation], None] | None = None,
    ) -> None:
        self.request = request
        self.usage = GenerationUsage(prompt_tokens=len(request.given_ids))
        self.new_ids: list[int] = []
        self.text = ""
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.finish_reason: FinishReason | None = None
        self.error: BaseException | None = None
        self.score: float | None = None  # what a search chose it by
        self.hidden: Tensor | None = None  # [prompt, hidden] in float32, where it was asked for
        self._drive = drive
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._listener: Callable[[TokenEvent], None] | None = None
        self._changed = threading.Condition()

    @property
    def ids(self) -> list[int]:
        """The prompt and every token generated."""
        return [*self.request.prompt_ids, *self.new_ids]

    @property
    def is_finished(self) -> bool:
        """Whether the last event has been given."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Give the request up; its slot is free within one step. Does nothing once it is finished."""
        if self._cancel is not None and not self.is_finished:
            self._cancel(self)

    def listen(self, listener: Callable[[TokenEvent], None]) -> None:
        """Call ``listener`` with every event, past and future, on the engine's thread: be quick."""
        with self._changed:
            while self._events:
                listener(self._events.popleft())
            self._listener = listener

    def __iter__(self) -> Iterator[TokenEvent]:
        while True:
            event = self.next_event()
            yield event
            if event.finish_reason is not None:
                if self.error is not None:
                    raise self.error
                return

    def result(self) -> Generation:
        """Wait for the end.

        Raises:
            MtnlgError: what went wrong inside the engine, if the finish reason is ``error``.
        """
        for _event in self:
            pass
        return self

    def put(self, event: TokenEvent) -> None:
        """The engine's side: file one event."""
        with self._changed:
            if event.token is not None:
                self.new_ids.append(event.token)
            if event.logprobs is not None:
                self.logprobs.append(event.logprobs)
            self.text += event.text
            self.finish_reason = event.finish_reason
            if self._listener is not None:
                self._listener(event)
            else:
                self._events.append(event)
                self._changed.notify_all()

    def events_so_far(self) -> list[TokenEvent]:
        """Events that have come and were not taken yet, without waiting."""
        with self._changed:
            events = list(self._events)
            self._events.clear()
            return events

    @property
    def is_over(self) -> bool:
        """Whether it is finished and every event was taken."""
        return self.is_finished and not self._events

    def next_event(self) -> TokenEvent:
        """Wait for the next event; there is none after the one with a finish reason."""
        while True:
            with self._changed:
                if self._events:
                    return self._events.popleft()
                if self._drive is None:
                    self._changed.wait()
                    continue
            self._drive()
