"""Sequences that begin alike and go on in several ways, over the pages of one runner.

Branches share the pages that are full; only the page that the next token goes into is a branch's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.runner import Row, Runner

PREFILL_CHUNK = 256  # tokens of the prompt that one pass works on


@dataclass
class Branch:
    """One way on.

    Args:
        pages: its pages in order.
        length: tokens whose keys and values are in them.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0


class Branches:
    """Keeps count of which branches hold which page; :meth:`close` gives all of them back.

    Args:
        runner: runs the model.
        books: of the runner's pages.
        source: what an encoder-decoder has read.
    """

    def __init__(self, runner: Runner, books: PageBooks, source: tuple[int, ...] | None = None) -> None:
        self._runner, self._books, self._source = runner, books, source
        self._holders: Counter[int] = Counter()

    def close(self) -> None:
        """Give every page back."""
        self._books.give_back(list(self._holders))
        self._holders.clear()

    def start(self, ids: Sequence[int]) -> Branch:
        """A branch that holds these tokens (none may be there at all)."""
        branch = Branch()
        for begin in range(0, len(ids), PREFILL_CHUNK):
            self.run([branch], [ids[begin : begin + PREFILL_CHUNK]], 0)
        return branch

    def run(self, branches: Sequence[Branch], ids: Sequence[Sequence[int]], num_logits: int = 1) -> Tensor:
        """Go on by these tokens; logits float32 [branches · num_logits, vocab]."""
        return self._runner.run(self._rows(branches, ids, num_logits))

    def hidden(self, branches: Sequence[Branch], ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Go on by these tokens; the hidden states of each branch's new ones, [new, hidden]."""
        return self._runner.hidden(self._rows(branches, ids, 0))

    def logits_of(self, hidden: Tensor) -> Tensor | None:
        """The logits that these hidden states lead to; ``None`` if the runner has to run for them."""
        found: Tensor | None = None
        of = getattr(self._runner, "logits_of", None)
        if of is not None:
            found = of(hidden)
        return found

    def step_back(self, branch: Branch, count: int) -> None:
        """Forget the last tokens of a branch, which are in pages of its own."""
        branch.length -= count

    def go_on(self, parents: Sequence[Branch], old: Sequence[Branch]) -> list[Branch]:
        """A branch for each parent, which may be there several times; ``old`` ones are given up.

        Args:
            parents: of the new branches; each one of ``old``.
            old: all branches there are.
        """
        chosen = {id(parent) for parent in parents}
        for branch in old:
            if id(branch) not in chosen:
                self.drop(branch)
        sources: list[int] = []
        targets: list[int] = []
        seen: set[int] = set()
        new = []
        for parent in parents:
            new.append(self._fork(parent, sources, targets) if id(parent) in seen else parent)
            seen.add(id(parent))
        if sources:
            self._runner.copy_pages(sources, targets)
        return new

    def drop(self, branch: Branch) -> None:
        """Give a branch up; pages that no other holds are free."""
        for page in branch.pages:
            self._holders[page] -= 1
        free = [page for page in branch.pages if not self._holders[page]]
        for page in free:
            del self._holders[page]
        self._books.give_back(free)
        branch.pages, branch.length = [], 0

    def _fork(self, parent: Branch, sources: list[int], targets: list[int]) -> Branch:
        num_full, is_partial = divmod(parent.length, self._books.page_size)
        pages = parent.pages[:num_full]
        for page in pages:
            self._holders[page] += 1
        branch = Branch(list(pages), parent.length)
        if is_partial:
            self._extend(branch, parent.length)
            sources.append(parent.pages[num_full])
            targets.append(branch.pages[num_full])
        return branch

    def _extend(self, branch: Branch, length: int) -> None:
        """Have pages for so many tokens."""
        missing = self._books.pages_for(length) - len(branch.pages)
        if missing <= 0:
            return
        pages = self._books.take(missing)
        if pages is None:
            raise MtnlgError(
                "the memory for keys and values does not hold so many branches of this length: use fewer "
                "beams or fewer new tokens, or give the engine more memory (cache_gib)."
            )
        self._holders.update(pages)
        branch.pages += pages

    def _rows(self, branches: Sequence[Branch], ids: Sequence[Sequence[int]], num_logits: int) -> list[Row]:
        rows = []
        for branch, new in zip(branches, ids, strict=True):
            self._extend(branch, branch.length + len(new))
            row = Row(list(new), branch.length, list(branch.pages), num_logits, self._source)
            rows.append(row)
            branch.length += len(new)
        return rows
