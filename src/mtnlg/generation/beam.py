"""Beam search and diverse beam search (arXiv 1610.02424).

Token by token the same as transformers' beam search, scores included: the candidates of a step are
twice the beams (more with several end tokens), so that enough go on when some end; of those that end
only the best ``num_beams`` candidates count; the finished ones are compared by their sum of
log-probabilities over length to the power of ``length_penalty``.

Diverse beam search lets groups of beams choose one after another; what an earlier group has chosen at
this step costs a later one ``diversity_penalty`` each time (Hamming diversity). As in the paper the
penalty decides what a group keeps and is no part of a sequence's own score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.branches import Branch, Branches
from mtnlg.generation.distribution import NOT_FINITE
from mtnlg.generation.penalties import edit_scores
from mtnlg.generation.request import FinishReason, GenerationRequest
from mtnlg.generation.sampler import NOTHING_LEFT, SamplingState
from mtnlg.generation.search import Access, Found, SearchOptions, check_search, ending_of


@dataclass
class Beam:
    """A sequence that is still growing.

    Args:
        state: its tokens, and what its rules look back at.
        score: its sum of log-probabilities.
        branch: its keys and values, all but the last token's.
    """

    state: SamplingState
    score: float
    branch: Branch

    @property
    def last_id(self) -> int:
        """The token that the model has not seen yet."""
        return [*self.state.prompt_ids[-1:], *self.state.new_ids][-1]


@dataclass
class Candidate:
    """A beam and one more token.

    Args:
        parent: the beam.
        token: the token.
        score: sum of log-probabilities.
        state: the parent's, gone on by the token, where a constraint has to be asked.
        ending: why it would end here.
    """

    parent: Beam
    token: int
    score: float
    state: SamplingState | None = None
    ending: FinishReason | None = None


class Group:
    """Beams that compete with each other.

    Args:
        first: the beam that all begin as.
        num_beams: how many are kept.
        request: where sequences end.
        options: how they are compared.
        max_length: total tokens at which they end.
    """

    def __init__(
        self,
        first: Beam,
        num_beams: int,
        request: GenerationRequest,
        options: SearchOptions,
        max_length: int,
    ) -> None:
        self.beams = [first]
        self.finished: list[Found] = []  # best first
        self.is_open = True
        self._num_beams, self._request, self._options = num_beams, request, options
        self._max_new = max_length - len(request.prompt_ids)
        self._num_candidates = max(2, 1 + len(set(request.end_ids))) * num_beams

    def advance(self, logprobs: Tensor, chosen: Mapping[int, int]) -> tuple[list[Candidate], list[int]]:
        """Choose the beams of the next step.

        Args:
            logprobs: float32 [beams, vocab] after the rules.
            chosen: how often earlier groups have chosen a token at this step.

        Returns:
            Those that go on (the caller makes beams of them), and the tokens that were chosen now, also
            where they end a sequence.
        """
        candidates = self._candidates(logprobs, chosen)
        length = len(self.beams[0].state.new_ids) + 1
        ending = [found for found in candidates[: self._num_beams] if found.ending is not None]
        going_on = [found for found in candidates if found.ending is None][: self._num_beams]
        if not (self._is_full and self._options.early_stopping is True):
            for candidate in ending:
                self._finish(candidate, length)
        tokens = [found.token for found in [*ending, *going_on]]
        self.is_open = bool(going_on) and self._is_worth_it(going_on[0].score, length)
        return (going_on if self.is_open else []), tokens

    def _candidates(self, logprobs: Tensor, chosen: Mapping[int, int]) -> list[Candidate]:
        totals = logprobs + torch.tensor([[beam.score] for beam in self.beams], device=logprobs.device)
        ranks = totals
        if chosen and self._options.diversity_penalty:
            ranks = totals.clone()
            index = torch.tensor(list(chosen), device=totals.device)
            times = torch.tensor(list(chosen.values()), device=totals.device)
            ranks[:, index] -= self._options.diversity_penalty * times
        best = ranks.flatten().topk(min(self._num_candidates, ranks.numel())).indices
        vocab = totals.shape[1]
        scores = totals.flatten()[best].tolist()
        return [
            self._candidate(self.beams[place // vocab], place % vocab, score)
            for place, score in zip(best.tolist(), scores)
            if score > float("-inf")
        ]

    def _candidate(self, parent: Beam, token: int, score: float) -> Candidate:
        length = len(parent.state.new_ids) + 1
        ending = ending_of(token, self._request, length, self._max_new)
        if parent.state.constraint is None or ending == "end":
            return Candidate(parent, token, score, None, ending)
        state = parent.state.fork()
        state.accept(token)
        if state.constraint is not None and state.constraint.is_complete:
            ending = "stop"
        return Candidate(parent, token, score, state, ending)

    def _finish(self, candidate: Candidate, length: int) -> None:
        assert candidate.ending is not None
        score = candidate.score / length**self._options.length_penalty
        ids = [*candidate.parent.state.new_ids, candidate.token]
        self.finished.append(Found(ids, score, candidate.ending))
        self.finished.sort(key=lambda found: -found.score)
        del self.finished[self._num_beams :]

    @property
    def _is_full(self) -> bool:
        return len(self.finished) == self._num_beams

    def _is_worth_it(self, best_score: float, length: int) -> bool:
        """Whether a growing sequence may still become better than the worst finished one."""
        if not self._is_full:
            return True
        options = self._options
        if options.early_stopping is True:
            return False
        at_best = options.early_stopping == "never" and options.length_penalty > 0
        best = best_score / (self._max_new if at_best else length) ** options.length_penalty
        return best > self.finished[-1].score


def beam_search(
    access: Access, request: GenerationRequest, options: SearchOptions, max_length: int
) -> list[Found]:
    """The ``options.num_return_sequences`` best continuations that were found, best first.

    Args:
        access: gives the runner and its pages, for one step at a time.
        request: prompt, penalties, constraint, end tokens, least number of new tokens.
        options: how to search.
        max_length: total tokens of prompt and continuation.

    Raises:
        ConfigError: the request asks for what a search cannot do.
        MtnlgError: the model gives no finite numbers, the rules leave no token, or the memory for keys
            and values is too small.
    """
    check_search(request)
    with access() as (runner, books):
        branches = Branches(runner, books, request.source_ids)
    try:
        with access():
            branch = branches.start(request.prompt_ids[:-1])
            state = SamplingState.of_request(request)
            size = options.num_beams // options.num_beam_groups
            groups = [
                Group(Beam(state, 0.0, branch), size, request, options, max_length)
                for _ in range(options.num_beam_groups)
            ]
            # All groups begin on the same branch; each goes on from one of its own.
            for group, own in zip(groups, branches.go_on([branch] * len(groups), [branch])):
                group.beams = [Beam(state, 0.0, own)]
        while any(group.is_open for group in groups):
            with access():
                _step(branches, [group for group in groups if group.is_open])
    finally:
        with access():
            branches.close()
    found = sorted((found for group in groups for found in group.finished), key=lambda one: -one.score)
    if not found:
        raise MtnlgError(NOTHING_LEFT)
    return found[: options.num_return_sequences]


@torch.inference_mode()
def _step(branches: Branches, groups: Sequence[Group]) -> None:
    """One token more for every beam of every group."""
    beams = [beam for group in groups for beam in group.beams]
    logits = branches.run([beam.branch for beam in beams], [[beam.last_id] for beam in beams])
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise MtnlgError(NOT_FINITE)
    logprobs = logits.float().log_softmax(dim=-1)
    edit_scores(logprobs, [beam.state for beam in beams])
    chosen: Counter[int] = Counter()
    going_on: list[list[Candidate]] = []
    begin = 0
    for group in groups:
        end = begin + len(group.beams)
        found, tokens = group.advance(logprobs[begin:end], chosen)
        chosen.update(tokens)
        going_on.append(found)
        begin = end
    parents = [candidate.parent.branch for found in going_on for candidate in found]
    new = iter(branches.go_on(parents, [beam.branch for beam in beams]))
    for group, found in zip(groups, going_on):
        group.beams = [_beam(candidate, next(new)) for candidate in found]


def _beam(candidate: Candidate, branch: Branch) -> Beam:
    state = candidate.state
    if state is None:
        state = candidate.parent.state.fork()
        state.accept(candidate.token)
    return Beam(state, candidate.score, branch)
