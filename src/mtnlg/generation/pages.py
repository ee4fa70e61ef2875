"""The books of the cache's pages: which are free, who holds which."""

from __future__ import annotations


class PageBooks:
    """Hands out pages and takes them back.

    Args:
        num_pages: pages there are.
        page_size: tokens of one.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages))[::-1]

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """So many pages, or ``None`` if there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        """These pages are not needed any more."""
        self._free += reversed(pages)
