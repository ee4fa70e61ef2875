"""The books of the cache's pages: which are free, who holds which, and which are kept for later prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

# What makes a page's content: the page before it (its serial number; for a text's first page 0, or a
# negative number for each adapter that it was computed with) and its tokens. Tokens
# themselves and not a hash of them, so that no two texts can ever be taken for each other.
Key = tuple[int, tuple[int, ...]]


class PageBooks:
    """Hands out pages, counts who holds them, and keeps full ones for prompts that begin alike.

    A full page whose content was filed (:meth:`file`) can be held by many requests at once. When nobody
    holds it any more it is kept, and given away only when no other page is free: the one that was let
    go longest ago first, and a text's last pages before its first.

    Args:
        num_pages: pages there are.
        page_size: tokens of one.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages))[::-1]
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept and held by nobody, oldest first
        self._page_of: dict[Key, int] = {}
        self._filed: dict[int, tuple[int, Key]] = {}  # page → its serial number and key
        self._last_serial = 0

    @property
    def num_free(self) -> int:
        """Pages that nobody holds, whether they keep something or not."""
        return len(self._free) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that keep the beginning of some text."""
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens need."""
        return -(-num_tokens // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """So many pages to write in, or ``None`` if there are not enough."""
        if count > self.num_free:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            _serial, key = self._filed.pop(page)
            del self._page_of[key]
        self._holders[page] = 1
        return page

    def give_back(self, pages: Sequence[int]) -> None:
        """One holder does not need these pages any more (given in the order of their text)."""
        for page in reversed(pages):  # the last first: a page is of no use without those before it
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._filed:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    # -- beginnings that are kept

    def find(self, contents: Iterable[tuple[int, ...]], root: int = 0) -> list[int]:
        """Hold the pages that begin with these tokens, as many as are kept in a row from the first."""
        found: list[int] = []
        serial = root
        for tokens in contents:
            page = self._page_of.get((serial, tokens))
            if page is None:
                break
            serial = self._filed[page][0]
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1
            found.append(page)
        return found

    def count(self, contents: Iterable[tuple[int, ...]], root: int = 0) -> int:
        """How many pages :meth:`find` would find."""
        serial, number = root, 0
        for number, tokens in enumerate(contents, start=1):
            page = self._page_of.get((serial, tokens))
            if page is None:
                return number - 1
            serial = self._filed[page][0]
        return number

    def file(self, page: int, before: int | None, tokens: tuple[int, ...], root: int = 0) -> int:
        """Keep a page that is full now.

        Args:
            page: the page; its holder holds it once.
            before: the page before it, as this method returned it; ``None`` for a text's first.
            tokens: its content.
            root: 0, or another number for each way in which the same tokens have other keys and values.

        Returns:
            The page to hold from now on: another one where that content was kept already.
        """
        if before is None:
            serial = root
        elif before in self._filed:
            serial = self._filed[before][0]
        else:  # what comes before is not kept (it was forgotten), so nobody could find this one
            return page
        key = (serial, tokens)
        known = self._page_of.get(key)
        if known is None:
            self._last_serial += 1
            self._filed[page] = (self._last_serial, key)
            self._page_of[key] = page
            return page
        if known == page:
            return page
        if self._holders[known] == 0:
            del self._idle[known]
        self._holders[known] += 1
        self.give_back([page])
        return known

    def forget(self) -> None:
        """Keep nothing of what was filed: the weights have changed."""
        self._page_of.clear()
        self._filed.clear()
        self._free += self._idle
        self._idle.clear()
