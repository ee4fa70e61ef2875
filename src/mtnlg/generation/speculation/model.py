"""Guessing with a small model (speculative decoding, arXiv 2211.17192).

The draft model runs over all requests together, a few single-token steps for one step of the large
model. Its tokens are drawn under the request's own rules (temperature, penalties, constraint, ...), so
that its distribution is as near as it can be to what the large model draws from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtnlg.generation.distribution import inverse_transform
from mtnlg.generation.pages import PageBooks
from mtnlg.generation.runner import Row, Runner
from mtnlg.generation.sampler import SamplingState, distributions, sample
from mtnlg.generation.scheduler import Draft, Running


@dataclass
class _Past:
    """What the draft model has of one request.

    Args:
        pages: memory of its keys and values.
        num_held: tokens of the request's own whose keys and values are there.
        guessed: tokens after these that were guessed, with keys and values too.
    """

    pages: list[int] = field(default_factory=list)
    num_held: int = 0
    guessed: list[int] = field(default_factory=list)

    def settle(self, ids: Sequence[int]) -> None:
        """Keep the guesses that came true."""
        for token in self.guessed:
            if self.num_held < len(ids) and ids[self.num_held] == token:
                self.num_held += 1
            else:
                break
        self.guessed = []
        # The last token's logits are wanted again, so it must be run again.
        self.num_held = min(self.num_held, len(ids) - 1)


@dataclass
class _Guessing:
    """One request while its next tokens are being guessed."""

    entry: Running
    past: _Past
    state: SamplingState
    count: int
    draft: Draft
    next_ids: Sequence[int]

    @property
    def is_done(self) -> bool:
        return len(self.draft.tokens) == self.count


class ModelDrafter:
    """Guesses with a draft model; see ``Drafter``.

    Args:
        runner: runs the draft model, whose vocabulary is the large one's.
        num_tokens: guessed at a time.
        prefill_chunk: most prompt tokens that one step works on; a request whose prompt the draft model
            has not finished goes without guesses.
    """

    def __init__(self, runner: Runner, num_tokens: int = 4, prefill_chunk: int = 256) -> None:
        self.runner, self.num_tokens, self.prefill_chunk = runner, num_tokens, prefill_chunk
        self._books = PageBooks(runner.num_pages, runner.page_size)
        self._pasts: dict[Running, _Past] = {}

    def draft(self, entries: Sequence[Running]) -> list[Draft]:
        """A guess for each request; empty where there is no room or the prompt is not yet read."""
        drafts = [Draft([], []) for _ in entries]
        guessing = []
        room = self.prefill_chunk
        for entry, draft in zip(entries, drafts):
            past = self._pasts.setdefault(entry, _Past())
            past.settle(entry.ids)
            count = min(
                self.num_tokens,
                entry.max_length - len(entry.ids) - 1,
                self.runner.max_length - len(entry.ids),
            )
            if count < 1 or room < 1 or not self._make_room(past, len(entry.ids) + count):
                continue
            new = entry.ids[past.num_held : past.num_held + room]
            room -= len(new)
            guessing.append(_Guessing(entry, past, entry.state.fork(), count, draft, new))
        self._read(guessing)
        return drafts

    def _read(self, guessing: list[_Guessing]) -> None:
        """Run the draft model until every guess is as long as wanted."""
        first = True
        while guessing:
            rows, choosing = [], []
            for one in guessing:
                start = one.past.num_held + len(one.past.guessed)
                is_read = not first or start + len(one.next_ids) == len(one.entry.ids)
                rows.append(Row(list(one.next_ids), start, one.past.pages, 1 if is_read else 0))
                if is_read:
                    choosing.append(one)
            logits = self.runner.run(rows)
            for one in guessing:
                if first:
                    one.past.num_held += len(one.next_ids)
                else:
                    one.past.guessed += one.next_ids
            first = False
            if choosing:
                _choose(choosing, logits)
            guessing = [one for one in choosing if not one.is_done]

    def _make_room(self, past: _Past, num_tokens: int) -> bool:
        missing = self._books.pages_for(num_tokens) - len(past.pages)
        pages = self._books.take(missing) if missing > 0 else []
        past.pages += pages or []
        return pages is not None

    def forget(self, entry: Running) -> None:
        """A request has ended: its memory is free."""
        past = self._pasts.pop(entry, None)
        if past is not None:
            self._books.give_back(past.pages)


def _choose(guessing: Sequence[_Guessing], logits: Tensor) -> None:
    """Add a token to each guess."""
    greedy = [place for place, one in enumerate(guessing) if one.state.rules.is_greedy]
    drawing = [place for place, one in enumerate(guessing) if not one.state.rules.is_greedy]
    tokens: dict[int, int] = {}
    if greedy:
        chosen = sample(logits[greedy], [guessing[place].state for place in greedy])
        tokens |= {place: sampled.token for place, sampled in zip(greedy, chosen)}
    if drawing:
        states = [guessing[place].state for place in drawing]
        weights = distributions(logits[drawing], states)
        numbers = torch.tensor([state.uniform() for state in states], dtype=torch.float64)
        drawn = inverse_transform(weights.nan_to_num(0.0), numbers).tolist()
        for place, token, row in zip(drawing, drawn, weights):
            is_sound = token < len(row) and bool(row[token] > 0)
            tokens[place] = token if is_sound else -1
            if is_sound:
                guessing[place].draft.drawn_from = [*guessing[place].draft.drawn_from, row]
    for place, one in enumerate(guessing):
        _take(one, tokens[place])


def _take(one: _Guessing, token: int) -> None:
    """Go on from a guessed token, or stop where nothing can follow it."""
    if token < 0:  # the rules leave nothing, or the draft model's numbers are not finite
        one.count = len(one.draft.tokens)
        return
    one.draft.tokens = [*one.draft.tokens, token]
    one.next_ids = [token]
    if token in one.state.end_ids:
        one.count = len(one.draft.tokens)
        return
    one.state.accept(token)
    if one.state.constraint is not None and one.state.constraint.is_complete:
        one.count = len(one.draft.tokens)
