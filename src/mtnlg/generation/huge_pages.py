"""Weights in large pages of memory, which the processor reads faster.

A step reads every weight once, from the first to the last. In pages of 4 KiB it looks up a new address
every 4 KiB and its prefetching stops there; Linux gives pages of 2 MiB to those who ask.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import queue
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE_PAGE = 2**21  # bytes
LINE = 64  # bytes
WORTH_ASKING = 2**19  # bytes; it takes neighbours to fill a large page, which most matrices have
ARENA = 2**25  # bytes that are asked for at once: matrices of a model lie beside each other
QUIET_SECONDS = 1.0  # without another matrix: the model is complete
ADVISE_HUGE, COLLAPSE_NOW = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, which Linux has from 6.1 on


class LargePages:
    """Memory for weights in large pages from its first use on: nothing has to be moved into them later.

    What was given out is free again when no tensor of its arena is left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arena: Tensor | None = None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory whose numbers are anything, beginning where a processor's line of memory begins."""
        num_bytes = dtype.itemsize
        for size in shape:
            num_bytes *= size
        if num_bytes < WORTH_ASKING or _madvise() is None:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            if self._arena is None or len(self._arena) < num_bytes:
                self._arena = _mapped(max(num_bytes, ARENA))
            given = self._arena[:num_bytes]
            self._arena = self._arena[-(-num_bytes // LINE) * LINE :]
        return given.view(dtype).view(shape)


def _mapped(num_bytes: int) -> Tensor:
    """Bytes in large pages where the system has some."""
    whole = -(-num_bytes // LARGE_PAGE) * LARGE_PAGE
    memory = mmap.mmap(-1, whole + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    return found[-found.data_ptr() % LARGE_PAGE :][:whole]


WEIGHTS = LargePages()


def use_huge_pages(address: int, num_bytes: int) -> bool:
    """Ask for large pages under memory that is in use; its content stays as it is.

    The pages at both ends hold what lies beside it too. Matrices of a model lie beside each other.

    Args:
        address: of its first byte.
        num_bytes: how long it is.

    Returns:
        Whether the system did it for some of it. It may refuse, or not know how: nothing but speed is
        lost.
    """
    advise = _madvise()
    if advise is None or num_bytes < WORTH_ASKING:
        return False
    begins = range(address // LARGE_PAGE * LARGE_PAGE, address + num_bytes, LARGE_PAGE)
    # All at once where the system takes that: it stops the whole machine's bookkeeping for every call.
    if _collapse(advise, begins[0], len(begins) * LARGE_PAGE):
        return True
    done = [_collapse(advise, begin) for begin in begins]  # all of them, not only the first
    return any(done)


class _Mover:
    """Has :func:`use_huge_pages` done in the background, one after another: a system takes milliseconds
    for each call, most of which it waits, and what lies there can be used meanwhile. It begins when a model
    is complete: the process can hardly get other memory meanwhile."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[object, int, int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_ending = False

    def add(self, owner: object, address: int, num_bytes: int) -> None:
        """Ask for large pages soon; ``owner`` keeps the memory until then."""
        self._jobs.put((owner, address, num_bytes))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mtnlg-large-pages", daemon=True)
                self._thread.start()
                # A thread that lets go of a tensor while the interpreter goes away takes the program down.
                atexit.register(self._end)

    def _end(self) -> None:
        self._is_ending = True
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            while jobs and not self._is_ending:
                _owner, address, num_bytes = jobs.pop(0)
                use_huge_pages(address, num_bytes)
                del _owner

    def _next(self) -> list[tuple[object, int, int]] | None:
        """All jobs, once no more come; ``None`` at the program's end."""
        jobs, job = [], self._jobs.get()
        with contextlib.suppress(queue.Empty):
            while job is not None:
                jobs.append(job)
                job = self._jobs.get(timeout=QUIET_SECONDS)
            return None
        return jobs


LATER = _Mover()


def _collapse(advise: Any, begin: int, num_bytes: int = LARGE_PAGE) -> bool:
    """Whole large pages; the system refuses where not all of their addresses are in use."""
    place = ctypes.c_void_p(begin), ctypes.c_size_t(num_bytes)
    return advise(*place, ADVISE_HUGE) == 0 and advise(*place, COLLAPSE_NOW) == 0


@cache
def _madvise() -> Any:
    """The C library's ``madvise``; ``None`` where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
