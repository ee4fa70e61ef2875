"""The sequences that one HTTP request asks for: submitted together, listened to, given up together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mtnlg.config.errors import ConfigError
from mtnlg.generation.constraint import DeadEndError
from mtnlg.generation.engine import EngineClosedError, QueueFullError
from mtnlg.generation.request import FinishReason, Generation, GenerationRequest, TokenEvent
from mtnlg.serving.errors import failed, invalid, out_of_time, queue_full, unavailable
from mtnlg.serving.logs import log
from mtnlg.serving.wakeups import Inbox

if TYPE_CHECKING:
    from mtnlg.serving.state import ServerState, Visit

# OpenAI knows no deadline: what was cut short by one has the reason of what was cut short.
FINISH_REASONS: dict[FinishReason, str] = {
    "end": "stop",
    "stop": "stop",
    "length": "length",
    "deadline": "length",
}


class ClientGoneError(Exception):
    """Nobody is there any more to answer to."""


class Job:
    """Sequences of one request, from submission to their end.

    Args:
        state: the server's.
        visit: what is known of the request.
        requests: one for each sequence.
        is_open_ended: nobody said how long the answers may get; only the prompt is charged beforehand.

    Raises:
        ApiError: 400 what the engine refuses; 429 the queue is full. Nothing is left behind then.
    """

    def __init__(
        self,
        state: ServerState,
        visit: Visit,
        requests: Sequence[GenerationRequest],
        is_open_ended: bool = False,
    ) -> None:
        self._state, self._visit = state, visit
        self.inbox = Inbox(state.wakeups)
        self.generations: list[Generation] = []
        prompts = {id(request.prompt_ids): len(request.prompt_ids) for request in requests}
        self.prompt_tokens = sum(prompts.values())
        wanted = 0 if is_open_ended else sum(request.max_new_tokens or 0 for request in requests)
        self._num_charged = self.prompt_tokens + wanted
        visit.caller.charge(self._num_charged)
        try:
            for request in requests:
                self.generations.append(state.backend.engine.submit(request))
        except ConfigError as error:
            self.close()
            raise invalid(" ".join(error.problems)) from error
        except QueueFullError as error:
            self.close()
            raise queue_full(str(error), state.seconds_until_free()) from error
        except EngineClosedError as error:
            self.close()
            raise unavailable("The engine takes no more requests.", "engine_stopped") from error
        for index, generation in enumerate(self.generations):
            generation.listen(self.inbox.listener(index))
        self._open = set(range(len(self.generations)))

    @property
    def num_open(self) -> int:
        """Sequences whose end has not been taken yet."""
        return len(self._open)

    async def events(self) -> list[tuple[int, TokenEvent]]:
        """The next events, (sequence, event).

        Raises:
            ApiError: 400 the request's rules lead nowhere; 500 the engine failed; 503 it was stopped.
            ClientGoneError: see :meth:`leave`.
        """
        found = await self.inbox.take()
        if self._visit.is_gone:
            raise ClientGoneError
        for index, event in found:
            if event.finish_reason is not None:
                self._open.discard(index)
                self._ended(self.generations[index], event.finish_reason)
        return found

    def _ended(self, generation: Generation, reason: FinishReason) -> None:
        self._state.metrics.observe(generation.usage, reason)
        if isinstance(generation.error, DeadEndError):
            message = f"The rules of this request lead nowhere: {generation.error}"
            raise invalid(message, code="invalid_value")
        if reason == "error":
            log("engine_error", 40, request_id=self._visit.request_id, error=repr(generation.error))
            raise failed(self._visit.request_id)
        if reason == "cancelled":
            raise unavailable("The server is shutting down and gave the request up.", "shutting_down")
        if reason == "deadline" and not generation.new_ids:
            raise out_of_time()

    def leave(self) -> None:
        """The client has left: :meth:`events` says so at once.

        The engine only learns of it after the step that it is in, which may be a long one.
        """
        self._visit.is_gone = True
        self.close()
        for index in self._open:
            self._state.metrics.observe(self.generations[index].usage, "cancelled")
        self.inbox.poke()

    def close(self) -> None:
        """Give up whatever still runs, and settle what was charged."""
        for generation in self.generations:
            generation.cancel()
        used = self.prompt_tokens + sum(generation.usage.new_tokens for generation in self.generations)
        self._visit.note_usage(self)
        self._visit.caller.tokens.give_back(self._num_charged - used)
        self._num_charged = used

    def usage(self) -> dict[str, object]:
        """``usage`` of an answer: a prompt counts once, however many answers it has."""
        new = sum(generation.usage.new_tokens for generation in self.generations)
        cached: dict[int, int] = {}
        for generation in self.generations:
            key, found = id(generation.request.prompt_ids), generation.usage.cached_tokens
            cached[key] = min(cached.get(key, found), found)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values()), "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }
