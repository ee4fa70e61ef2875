"""From the engine's thread to the event loop: many events, one wake-up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mtnlg.generation.request import TokenEvent


class Inbox:
    """Events of the sequences of one request, taken on the event loop.

    Args:
        wakeups: brings them there.
    """

    def __init__(self, wakeups: Wakeups) -> None:
        self._wakeups = wakeups
        self._events: list[tuple[int, TokenEvent]] = []
        self._waiter: asyncio.Future[None] | None = None

    def listener(self, index: int) -> Callable[[TokenEvent], None]:
        """What :meth:`Generation.listen` is given for the sequence ``index``."""
        post = self._wakeups.post

        def hear(event: TokenEvent) -> None:
            post(_Letter(self, index, event))

        return hear

    async def take(self) -> list[tuple[int, TokenEvent]]:
        """Every event that has come, (sequence, event): none only after a poke."""
        if not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        found, self._events = self._events, []
        return found

    def poke(self) -> None:
        """Let :meth:`take` return, empty-handed if need be."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put(self, index: int, event: TokenEvent) -> None:
        """On the loop: file an event."""
        self._events.append((index, event))
        self.poke()


@dataclass(frozen=True, slots=True)
class _Letter:
    inbox: Inbox
    index: int
    event: TokenEvent


class Wakeups:
    """Carries events to their inboxes; however many there are, the loop is woken once.

    Args:
        loop: where the inboxes are emptied.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._letters: deque[_Letter] = deque()
        self._is_called = False

    def post(self, letter: _Letter) -> None:
        """On the engine's thread: send an event on its way."""
        self._letters.append(letter)  # before the flag is read: see _deliver
        if not self._is_called:
            self._is_called = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # The flag falls before the letters are read: whoever still saw it up had posted already.
        self._is_called = False
        while self._letters:
            letter = self._letters.popleft()
            letter.inbox.put(letter.index, letter.event)
