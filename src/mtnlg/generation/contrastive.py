"""Contrastive search (arXiv 2202.06417): likely tokens that do not say again what was said.

Of the ``k`` most likely tokens v the one is taken that maximises

    (1 - α) · p(v | x) - α · max over j of cos(h_v, h_j)

where h_v is the last hidden state (after the final norm) that v would have, and h_j those of all tokens
before it, the prompt's included. Each step runs the model once, over the ``k`` candidates side by side,
which share the pages of what came before; the hidden state of the one that is taken leads to the next
logits. A model over ranks, or with an adapter, runs a second time for these, over one token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config.errors import ConfigError, MtnlgError
from mtnlg.generation.branches import PREFILL_CHUNK, Branch, Branches
from mtnlg.generation.distribution import NOT_FINITE
from mtnlg.generation.penalties import edit_scores
from mtnlg.generation.request import GenerationRequest
from mtnlg.generation.sampler import NOTHING_LEFT, SamplingState
from mtnlg.generation.search import Access, Found, SearchOptions, check_search, ending_of


def contrastive_search(
    access: Access, request: GenerationRequest, options: SearchOptions, max_length: int
) -> Found:
    """The continuation that contrastive search gives.

    Args:
        access: gives the runner and its pages, for one step at a time.
        request: prompt, penalties, constraint, end tokens, least number of new tokens.
        options: ``penalty_alpha`` is α and ``top_k`` k.
        max_length: total tokens of prompt and continuation.

    Raises:
        ConfigError: the request asks for what a search cannot do.
        MtnlgError: the model gives no finite numbers, the rules leave no token, or the memory for keys
            and values is too small.
    """
    check_search(request)
    if request.source_ids is not None:
        raise ConfigError("penalty_alpha: contrastive search is for decoders; use num_beams, or sample.")
    with access() as (runner, books):
        search = _Contrastive(Branches(runner, books), request, options, max_length)
    try:
        with access():
            search.begin()
        while search.found is None:
            with access():
                search.step()
    finally:
        with access():
            search.close()
    return search.found


class _Contrastive:
    """One search: what was said, and the hidden states of it."""

    def __init__(
        self, branches: Branches, request: GenerationRequest, options: SearchOptions, max_length: int
    ) -> None:
        self.found: Found | None = None
        self.close = branches.close
        self._branches, self._request, self._options = branches, request, options
        self._max_new = max_length - len(request.prompt_ids)
        self._state = SamplingState.of_request(request)
        self._branch = Branch()
        self._said: Tensor | None = None  # [tokens, hidden] directions of the hidden states
        self._last: Tensor | None = None  # [1, hidden] the last of them as it is
        self._score = 0.0

    @torch.inference_mode()
    def begin(self) -> None:
        """Take in the prompt."""
        ids = self._request.prompt_ids
        states = [
            self._branches.hidden([self._branch], [ids[start : start + PREFILL_CHUNK]])[0]
            for start in range(0, len(ids), PREFILL_CHUNK)
        ]
        self._said, self._last = _directions(torch.cat(states)), states[-1][-1:]

    @torch.inference_mode()
    def step(self) -> None:
        """Choose the next token."""
        assert self._said is not None
        tokens, probabilities = self._candidates()
        candidates = self._branches.go_on([self._branch] * len(tokens), [self._branch])
        hidden = self._branches.hidden(candidates, [[token] for token in tokens])
        directions = _directions(torch.cat(hidden))  # [candidates, hidden]
        likeness = (directions @ self._said.T).amax(dim=-1).cpu()
        alpha = self._options.penalty_alpha or 0.0
        scores = (1.0 - alpha) * probabilities - alpha * likeness
        best = int(scores.argmax())
        self._score += float(scores[best])
        self._said, self._last = torch.cat([self._said, directions[best : best + 1]]), hidden[best]
        self._branch = self._branches.go_on([candidates[best]], candidates)[0]
        self._take(tokens[best])

    def _candidates(self) -> tuple[list[int], Tensor]:
        """The most likely tokens and their probabilities [candidates], likeliest first."""
        state = self._state
        logits = self._logits().float().contiguous()
        if not bool(logits.amax().isfinite()):
            raise MtnlgError(NOT_FINITE)
        edit_scores(logits, [state])
        if not bool(logits.amax().isfinite()):
            raise MtnlgError(NOTHING_LEFT)
        probabilities = logits[0].softmax(dim=-1)
        best = probabilities.topk(min(self._options.top_k, len(probabilities)))
        kept = best.values > 0.0
        return best.indices[kept].tolist(), best.values[kept].cpu()

    def _logits(self) -> Tensor:
        """[1, vocab] of the token after the last."""
        assert self._last is not None
        logits = self._branches.logits_of(self._last)
        if logits is None:
            last = [*self._state.prompt_ids[-1:], *self._state.new_ids][-1]
            self._branches.step_back(self._branch, 1)  # it was run for its hidden state, now for its logits
            logits = self._branches.run([self._branch], [[last]])
        return logits

    def _take(self, token: int) -> None:
        state = self._state
        state.accept(token)
        ending = ending_of(token, self._request, len(state.new_ids), self._max_new)
        if ending != "end" and state.constraint is not None and state.constraint.is_complete:
            ending = "stop"
        if ending is not None:
            self.found = Found(list(state.new_ids), self._score, ending)


def _directions(hidden: Tensor) -> Tensor:
    """[tokens, hidden] of length 1."""
    return F.normalize(hidden.float(), dim=-1)
