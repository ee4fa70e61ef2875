"""Who may touch the model next."""

from __future__ import annotations

import threading


class FairLock:
    """A lock that whoever waits gets next, also where its last holder wants it again at once."""

    def __init__(self) -> None:
        self._queue, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._queue:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def try_to_enter(self) -> bool:
        """Enter if nobody is there."""
        return self._lock.acquire(blocking=False)
