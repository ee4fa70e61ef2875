"""Threads for work that would hold the event loop up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any

Task = tuple[Future[Any], Callable[[], Any]]


class Workers(Executor):
    """Threads that the process does not wait for when it ends.

    Those of :class:`~concurrent.futures.ThreadPoolExecutor` are waited for: a rule that takes minutes to
    compile would keep a server alive that has said goodbye to everybody.

    Args:
        count: how many.
        name: of the threads, for debuggers.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._count, self._is_over = count, False
        for number in range(count):
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True).start()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a function called."""
        future: Future[Any] = Future()
        self._tasks.put((future, lambda: work(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Begin nothing more; what runs is left to itself, whatever is asked."""
        self._is_over = True
        for _ in range(self._count):
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, work = task
            if self._is_over:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del task, future, work  # a thread that waits holds nothing of the last request
