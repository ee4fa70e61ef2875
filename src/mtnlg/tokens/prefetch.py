"""Reading ahead: the next batches are assembled in a thread while the model computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Protocol

from mtnlg.tokens.batch import Batch

_END = object()


class Batches(Protocol):
    """Where batches are asked for by position."""

    def batch(self, position: int, count: int, replica: int = 0, num_replicas: int = 1) -> Batch:
        """One batch."""


def prefetch(
    stream: Batches,
    requests: Iterable[tuple[int, int]],
    replica: int = 0,
    num_replicas: int = 1,
    depth: int = 2,
) -> Iterator[Batch]:
    """``stream.batch(position, count, replica, num_replicas)`` for each request, read ahead.

    Worth it where pages of the token files come from a slow disk; batches in memory take less time
    than the hand-over saves. Closing the iterator ends the thread; an error in it is raised here.

    Args:
        stream: where the samples come from.
        requests: (position, count) of each batch; may be endless.
        replica: number of this replica.
        num_replicas: replicas in all.
        depth: batches held at most.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for position, count in requests:
                if stopped.is_set():
                    return
                put(stream.batch(position, count, replica, num_replicas))
            put(_END)
        except BaseException as error:  # carried over to the reader of the batches
            put(error)

    thread = threading.Thread(target=read, name="mtnlg-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            assert isinstance(item, Batch)
            yield item
    finally:
        stopped.set()
        thread.join()
