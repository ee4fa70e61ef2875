"""Who takes part in the next step, with how many tokens, and in which memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.piece_budget import PieceBudget
from mtnlg.generation.request import Generation
from mtnlg.generation.runner import Row
from mtnlg.generation.sampler import SamplingState
from mtnlg.generation.text import TextStream


@dataclass(eq=False)
class Running:
    """A request while the engine works on it.

    Args:
        generation: what its user holds.
        max_length: tokens at which it ends.
        state: what the choice of its next token depends on.
        text: its text; ``None`` where the engine gives ids only.
        submitted: when it came (monotonic seconds).
        ids: the prompt and the tokens chosen so far.
        pages: memory of its keys and values, in order.
        num_held: tokens whose keys and values are there.
        num_filed: of its pages, how many others may find.
        is_running: whether it has a place in the batch.
        has_run: whether it ever had one.
        hidden: its hidden states so far, where it asks for them.
        adapter: what the model is changed by for it; its virtual tokens are among ``ids``.
    """

    generation: Generation
    max_length: int
    state: SamplingState
    text: TextStream | None
    submitted: float
    ids: list[int]
    pages: list[int] = field(default_factory=list)
    num_held: int = 0
    num_filed: int = 0
    is_running: bool = False
    has_run: bool = False
    last_token_at: float = 0.0
    hidden: list[Tensor] = field(default_factory=list)
    adapter: LoadedAdapter | None = None

    @property
    def root(self) -> int:
        """Whose beginnings of texts it can share: those computed with the same adapter."""
        return 0 if self.adapter is None else -self.adapter.serial

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.generation.request.prompt_ids)

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while it only generates."""
        return len(self.ids) - self.num_held

    @property
    def needs_every_token(self) -> bool:
        """Whether its prompt must be computed even where keys and values are known."""
        request = self.generation.request
        return request.hidden or request.prompt_logprobs is not None

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be given."""
        scores = self.generation.prompt_logprobs
        return scores is not None and len(scores) < self.num_prompt


@dataclass
class Share:
    """What one request does in a step.

    Args:
        entry: whose.
        row: its new tokens, guessed ones at the end.
        draft: the guessed ones.
        drawn_from: what they were drawn from; see ``Draft``.
    """

    entry: Running
    row: Row
    draft: Sequence[int] = ()
    drawn_from: Sequence[Tensor] = ()

    def guess(self, step: int) -> tuple[int, Tensor] | None:
        """The guess that comes after ``step`` right ones, where it was drawn at random."""
        return (self.draft[step], self.drawn_from[step]) if step < len(self.drawn_from) else None


@dataclass
class Draft:
    """A guess at the next tokens of a sequence.

    Args:
        tokens: the guessed tokens in order; may be empty.
        drawn_from: probabilities float32 [vocab] for each token, where it was drawn at random; empty
            where nothing was left to chance.
    """

    tokens: Sequence[int] = ()
    drawn_from: Sequence[Tensor] = ()


class Drafter(Protocol):
    """Guesses what comes next, for the model to check in one step: speculative decoding.

    Every token is still chosen by the model's own logits, so guesses change how fast tokens come, and
    neither which is the most likely nor how likely each is.
    """

    def draft(self, entries: Sequence[Running]) -> Sequence[Draft]:
        """The next tokens of each request (``entry.ids`` so far), none where there is no good guess."""

    def forget(self, entry: Running) -> None:
        """A request has ended."""


class Scheduler:
    """Plans steps: first come, first served; whoever generates is in every step.

    Memory is given page by page as texts grow. When none is left, the request that was let in last
    makes room: it goes back to the head of the queue and its keys and values are computed again later
    (the oldest always gets on, so all do). A request whose prompt begins as one that is being computed
    right now waits for those pages instead of computing them a second time.

    Args:
        books: the pages.
        max_batch_size: requests that may run together.
        prefill_chunk: most prompt tokens of one step, all requests together.
        keep_prefixes: let later prompts use pages of earlier ones.
        piece: compute prompts in pieces that always begin and end at multiples of so many tokens, and
            share whole pieces only, so that a token's numbers never depend on who else is there;
            ``None`` cuts prompts wherever a step is full.
        use_cache: ``False`` computes every token anew in every step.
        drafter: guesses tokens; not asked where prompts are computed in pieces, because a guessed token's
            numbers come from another product than a token's alone.
    """

    def __init__(
        self,
        books: PageBooks,
        max_batch_size: int,
        prefill_chunk: int,
        keep_prefixes: bool = True,
        piece: int | None = None,
        use_cache: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        self.books = books
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # oldest first
        self.num_preempted = 0
        self._max_batch_size = max_batch_size
        self._budget = PieceBudget(prefill_chunk)
        self._planned = (0, 0)  # prompt tokens of the step, and requests that wait for their next token
        self._keep = keep_prefixes and use_cache
        self._piece = piece
        self._use_cache = use_cache
        self.drafter = drafter if use_cache and piece is None else None
        self._unit = piece or books.page_size  # tokens that are shared together

    # -- who is there

    def remove(self, entry: Running) -> None:
        """Let a request go, wherever it is; its pages are free."""
        if self.drafter is not None:
            self.drafter.forget(entry)
        if entry.is_running:
            self.running.remove(entry)
            self._take_pages_back(entry)
        elif entry in self.waiting:
            self.waiting.remove(entry)

    def _take_pages_back(self, entry: Running) -> None:
        self.books.give_back(entry.pages)
        entry.pages, entry.num_held, entry.num_filed, entry.is_running = [], 0, 0, False

    def _admit(self) -> list[Running]:
        """Let in who can be; returns those that were let in for the first time."""
        passed_over: list[Running] = []
        newcomers = []
        while self.waiting and len(self.running) < self._max_batch_size:
            entry = self.waiting.popleft()
            if self._is_being_computed(entry):
                passed_over.append(entry)
                continue
            if not self._find_room(entry):
                passed_over.append(entry)
                break
            entry.is_running = True
            self.running.append(entry)
            if not entry.has_run:
                entry.has_run = True
                newcomers.append(entry)
        self.waiting.extendleft(reversed(passed_over))
        return newcomers

    def _is_being_computed(self, entry: Running) -> bool:
        """Whether someone computes, right now, the pages that this prompt needs next."""
        if not self._keep or entry.needs_every_token:
            return False
        busy = [other for other in self.running if other.num_held < other.num_prompt]
        if not busy:
            return False
        num_pages = self.books.count(self._contents(entry), entry.root)
        known = num_pages * self.books.page_size // self._unit * self._unit
        end = known + self._unit
        if end > len(entry.ids) - 1:
            return False
        wanted = entry.ids[:end]
        return any(
            known <= other.num_held < end <= self._num_shareable(other) and other.ids[:end] == wanted
            for other in busy
            if other.adapter is entry.adapter
        )

    def _find_room(self, entry: Running) -> bool:
        books = self.books
        found: list[int] = []
        if self._keep and not entry.needs_every_token:
            found = books.find(self._contents(entry), entry.root)
            whole = len(found) * books.page_size // self._unit * self._unit // books.page_size
            books.give_back(found[whole:])
            found = found[:whole]
        needed = books.pages_for(len(entry.ids)) - len(found)
        # Those who run will soon want a page each; taking the last ones would only throw someone out.
        if needed + len(self.running) > books.num_free:
            books.give_back(found)
            return False
        entry.pages = found + (books.take(needed) or [])
        entry.num_held, entry.num_filed = len(found) * books.page_size, len(found)
        return True

    def _contents(self, entry: Running) -> Iterator[tuple[int, ...]]:
        """The tokens of each full page, but for the last token, whose logits must be computed."""
        size = self.books.page_size
        for start in range(0, (len(entry.ids) - 1) // size * size, size):
            yield tuple(entry.ids[start : start + size])

    def _num_shareable(self, entry: Running) -> int:
        """Tokens whose pages others may use: all, or the prompt's whole pieces."""
        if self._piece is None:
            return len(entry.ids)
        return entry.num_prompt // self._piece * self._piece

    # -- what each does

    def plan(self) -> tuple[list[Share], list[Running]]:
        """The next step: everyone's share, and who takes part for the first time."""
        newcomers = self._admit()
        shares: list[Share] = []
        generating: list[Running] = []
        unfinished: list[Running] = []
        for entry in tuple(self.running):
            if not entry.is_running:  # it has just made room for an older one
                continue
            if not self._use_cache:
                if self._make_room(entry, len(entry.ids)):
                    shares.append(self._share(entry, len(entry.ids)))
            elif entry.num_missing > 1:
                unfinished.append(entry)
            elif self._make_room(entry, len(entry.ids)):
                generating.append(entry)
        shares += self._go_on(generating)
        prompts: list[Share] = []
        if unfinished:
            room = self._budget.room(len(generating), len(unfinished))
            prompts = self._share_prompts(unfinished, room)
        self._planned = (sum(len(share.row.ids) for share in prompts), len(generating))
        return shares + prompts, newcomers

    def note(self, seconds: float) -> None:
        """What the model took for the step that was planned last."""
        self._budget.note(seconds, *self._planned)

    def _go_on(self, entries: list[Running]) -> list[Share]:
        """One token of each, and what is guessed to follow."""
        shares = [self._share(entry, 1) for entry in entries]
        if self.drafter is None or not entries:
            return shares
        for share, draft in zip(shares, self.drafter.draft(entries), strict=True):
            entry, row = share.entry, share.row
            if not row.num_logits or entry.generation.request.hidden:
                continue
            if entry.adapter is not None and entry.adapter.num_virtual:
                continue  # its ids are not those of a text, and no draft model knows them
            room = min(len(draft.tokens), entry.max_length - len(entry.ids) - 1)
            missing = self.books.pages_for(len(entry.ids) + room) - len(entry.pages)
            if missing > 0:  # nobody loses a place for a guess
                entry.pages += self.books.take(missing) or []
                room = min(room, len(entry.pages) * self.books.page_size - len(entry.ids))
            if room > 0:
                share.draft, share.drawn_from = list(draft.tokens[:room]), draft.drawn_from[:room]
                row.ids, row.num_logits = [*row.ids, *share.draft], room + 1
        return shares

    def _make_room(self, entry: Running, num_tokens: int) -> bool:
        """See that ``entry`` has pages for so many tokens; ``False`` if it lost its place instead."""
        books = self.books
        while len(entry.pages) * books.page_size < num_tokens:
            page = books.take(1)
            if page is not None:
                entry.pages += page
                continue
            youngest = self.running.pop()
            self._take_pages_back(youngest)
            self.waiting.appendleft(youngest)
            self.num_preempted += 1
            if youngest is entry:
                return False
        return True

    def _share_prompts(self, entries: list[Running], room: int) -> list[Share]:
        """Divide the step's prompt tokens.

        The oldest gets half of them, so that nobody waits for ever; the rest goes to those who need
        least, so that short prompts do not wait for long ones; what is left goes to the oldest.
        """
        oldest = entries[0]
        kept = min(oldest.num_missing, max(1, room // 2)) if len(entries) > 1 else 0
        shares = []
        for entry in sorted(entries[1:], key=lambda other: other.num_missing):
            if room - kept <= 0:
                break
            share = self._share(entry, self._portion(entry, room - kept))
            shares.append(share)
            room -= len(share.row.ids)
        return [self._share(oldest, self._portion(oldest, max(room, 1))), *shares]

    def _portion(self, entry: Running, room: int) -> int:
        if self._piece is None:
            return min(entry.num_missing, room)
        if entry.num_held >= entry.num_prompt:  # computed one by one at first, so again
            return 1
        return min((entry.num_held // self._piece + 1) * self._piece, entry.num_prompt) - entry.num_held

    def _share(self, entry: Running, count: int) -> Share:
        start = entry.num_held
        source = entry.generation.request.source_ids
        row = Row(entry.ids[start : start + count], start, entry.pages, 0, source, entry.adapter)
        if entry.wants_prompt_scores:
            row.num_logits = count
        elif start + count == len(entry.ids):
            row.num_logits = 1
        return Share(entry, row)

    def advance(self, entry: Running, count: int) -> None:
        """So many more tokens of a request are computed: let others find the pages that are full."""
        if not self._use_cache:
            return
        entry.num_held += count
        if not self._keep:
            return
        size = self.books.page_size
        end = min(entry.num_held, self._num_shareable(entry))
        while (entry.num_filed + 1) * size <= end:
            place = entry.num_filed
            before = entry.pages[place - 1] if place else None
            tokens = tuple(entry.ids[place * size : (place + 1) * size])
            entry.pages[place] = self.books.file(entry.pages[place], before, tokens, entry.root)
            entry.num_filed += 1
