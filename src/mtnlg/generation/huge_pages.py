"""Weights in large pages of memory, which the processor reads faster.

A step reads every weight once, from the first to the last. In pages of 4 KiB it looks up a new address
every 4 KiB and its prefetching stops there; Linux gives pages of 2 MiB to those who ask.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

LARGE_PAGE = 2**21  # bytes
WORTH_ASKING = 2**19  # bytes; it takes neighbours to fill a large page, which most matrices have
ADVISE_HUGE, COLLAPSE_NOW = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, which Linux has from 6.1 on


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
    done = [_collapse(advise, begin) for begin in begins]  # all of them, not only the first
    return any(done)


def _collapse(advise: Any, begin: int) -> bool:
    """One large page; the system refuses where not all of its addresses are in use."""
    place = ctypes.c_void_p(begin), ctypes.c_size_t(LARGE_PAGE)
    return advise(*place, ADVISE_HUGE) == 0 and advise(*place, COLLAPSE_NOW) == 0


@cache
def _madvise() -> Any:
    """The C library's ``madvise``; ``None`` where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
