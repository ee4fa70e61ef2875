"""One step: the model over everyone's share, the tokens it leads to, and whom they end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mtnlg.config.errors import MtnlgError
from mtnlg.generation.constraint import DeadEndError
from mtnlg.generation.request import FinishReason, TokenEvent, TokenLogprobs
from mtnlg.generation.runner import Runner
from mtnlg.generation.sampler import NOTHING_LEFT, Sampled, many_logprobs
from mtnlg.generation.scheduler import Running, Scheduler, Share
from mtnlg.generation.speculation.verify import sample_drafted
from mtnlg.generation.statistics import EngineStatistics

LOG = logging.getLogger(__name__)


class Finish(Protocol):
    """How a step ends a request."""

    def __call__(
        self,
        entry: Running,
        reason: FinishReason,
        event: TokenEvent | None = None,
        error: BaseException | None = None,
    ) -> None:
        """End ``entry`` and tell its user, with ``event`` where there is one to give."""


class Stepper:
    """Does what the scheduler plans.

    An error ends those whom it concerns, with the finish reason ``error``, and nobody else: one of the
    model everyone in the step, one of a request's own rules, constraint, text or listener that request.

    Args:
        runner: runs the model.
        scheduler: plans.
        statistics: counted here.
        finish: ends a request.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, statistics: EngineStatistics, finish: Finish
    ) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._statistics, self._finish = statistics, finish

    def step(self) -> bool:
        """Do one step; returns whether there was anything to do."""
        began = time.perf_counter()
        shares, newcomers = self._scheduler.plan()
        if newcomers:
            self._welcome(newcomers)
        if not shares:
            return False
        statistics = self._statistics
        model_began = time.perf_counter()
        try:
            logits = self._run(shares)
        except Exception as error:
            LOG.exception("the model failed in a step of %d requests", len(shares))
            wrapped = error if isinstance(error, MtnlgError) else MtnlgError(f"the model failed: {error!r}")
            for share in shares:
                self._finish(share.entry, "error", error=wrapped)
            return True
        model_seconds = time.perf_counter() - model_began
        statistics.model_seconds += model_seconds
        self._scheduler.note(model_seconds)
        for share in shares:
            self._scheduler.advance(share.entry, len(share.row.ids) - len(share.draft))
        if logits is not None:
            self._choose([share for share in shares if not share.entry.generation.request.hidden], logits)
        self._end_embeddings(shares)
        statistics.steps += 1
        statistics.batch_rows.observe(len(shares))
        statistics.step_seconds += time.perf_counter() - began
        return True

    def _welcome(self, newcomers: Sequence[Running]) -> None:
        now = time.monotonic()
        for entry in newcomers:
            usage = entry.generation.usage
            usage.queue_seconds = now - entry.submitted
            usage.cached_tokens = entry.num_held
            self._statistics.queue_seconds.observe(usage.queue_seconds)
            self._statistics.prompt_tokens += entry.num_prompt
            self._statistics.cached_tokens += entry.num_held

    # -- the model

    def _run(self, shares: Sequence[Share]) -> Tensor | None:
        """Logits of all rows that want some; hidden states are filed."""
        rows, embedded = [], []
        for share in shares:
            if share.entry.generation.request.hidden:
                embedded.append(share)
            else:
                rows.append(share.row)
        if embedded:
            found = self._runner.hidden([share.row for share in embedded])
            for share, states in zip(embedded, found, strict=True):
                share.entry.hidden.append(states.float().cpu())
        return self._runner.run(rows) if rows else None

    # -- the tokens

    def _choose(self, shares: Sequence[Share], logits: Tensor) -> None:
        """Choose the next tokens of everyone whose last logits are here."""
        choosing: list[Share] = []
        places: list[int] = []
        end = 0
        for share in shares:
            entry, row = share.entry, share.row
            if not row.num_logits:
                continue
            end += row.num_logits
            if entry.wants_prompt_scores:
                _file_prompt_scores(share, logits[end - row.num_logits : end])
            if row.start + len(row.ids) < len(entry.ids):
                continue
            if len(entry.ids) < entry.max_length:
                choosing.append(share)
                places.append(end - 1 - len(share.draft))
            else:  # only the prompt's scores were wanted
                self._finish(entry, "length")
        step = 0
        while choosing:  # once, and once more for those whose guess was right
            asked = logits if len(places) == len(logits) else logits[[place + step for place in places]]
            chosen = self._sample(choosing, asked, step)
            going_on = [
                number
                for number, (share, sampled) in enumerate(zip(choosing, chosen))
                if sampled is not None and self._take_or_fail(share, sampled, step)
            ]
            choosing = [choosing[number] for number in going_on]
            places = [places[number] for number in going_on]
            step += 1

    def _sample(self, shares: Sequence[Share], logits: Tensor, step: int) -> Sequence[Sampled | None]:
        """A token for each, ``None`` where its request has ended with an error."""
        began = time.perf_counter()
        try:
            states = [share.entry.state for share in shares]
            return sample_drafted(logits, states, [share.guess(step) for share in shares])
        except Exception as error:
            if len(shares) == 1:
                self._fail(shares[0].entry, error)
                return [None]
        finally:
            self._statistics.sampling_seconds += time.perf_counter() - began
        return [self._sample_alone(share, step) for share in shares]

    def _sample_alone(self, share: Share, step: int) -> Sampled | None:
        """Find whose fault it was: the others get their token.

        The sampler may have written over the logits, so the model runs again; it writes the same keys
        and values to the same places.
        """
        row, count = share.row, len(share.draft) + 1
        try:
            logits = self._runner.run([replace(row, num_logits=count)])
            return sample_drafted(logits[step : step + 1], [share.entry.state], [share.guess(step)])[0]
        except Exception as error:
            self._fail(share.entry, error)
            return None

    def _take_or_fail(self, share: Share, sampled: Sampled, step: int) -> bool:
        """File a token; returns whether the next one is known already, because it was guessed."""
        entry = share.entry
        try:
            if sampled.error is not None:
                raise (DeadEndError if sampled.error == NOTHING_LEFT else MtnlgError)(sampled.error)
            self._take(entry, sampled)
        except Exception as error:
            self._fail(entry, error)
            return False
        if step >= len(share.draft):
            return False
        self._statistics.drafted_tokens += step == 0 and len(share.draft)
        if share.draft[step] != sampled.token:
            return False
        self._statistics.accepted_tokens += 1
        if entry.is_running:
            self._scheduler.advance(entry, 1)
        return entry.is_running

    def _fail(self, entry: Running, error: Exception) -> None:
        if not isinstance(error, MtnlgError):
            LOG.error("a request failed: %r", error, exc_info=error)
            error = MtnlgError(f"the request failed: {error!r}")
        self._finish(entry, "error", error=error)

    def _take(self, entry: Running, sampled: Sampled) -> None:
        """File one new token and see whether it is the last."""
        token, state, stream = sampled.token, entry.state, entry.text
        state.accept(token)
        entry.ids.append(token)
        self._time(entry)
        reason: FinishReason | None = None
        text = ""
        if token in state.end_ids:
            reason = "end"
        else:
            if stream is not None:
                text = stream.push(token)
                if stream.is_stopped:
                    reason = "stop"
            if reason is None and state.constraint is not None and state.constraint.is_complete:
                reason = "stop"
            if reason is None and len(entry.ids) >= entry.max_length:
                reason = "length"
        if reason is None:
            entry.generation.put(TokenEvent(token, text, sampled.logprobs))
            return
        if stream is not None and not stream.is_stopped:
            text += stream.finish()
        self._finish(entry, reason, TokenEvent(token, text, sampled.logprobs, reason))

    def _time(self, entry: Running) -> None:
        now = time.monotonic()
        usage, statistics = entry.generation.usage, self._statistics
        statistics.new_tokens += 1
        usage.new_tokens += 1
        if usage.new_tokens == 1:
            usage.first_token_seconds = now - entry.submitted
            statistics.first_token_seconds.observe(usage.first_token_seconds)
        else:
            statistics.between_tokens_seconds.observe(now - entry.last_token_at)
        entry.last_token_at = now

    def _end_embeddings(self, shares: Sequence[Share]) -> None:
        for share in shares:
            entry = share.entry
            if entry.generation.request.hidden and entry.num_held == len(entry.ids):
                entry.generation.hidden = torch.cat(entry.hidden)
                self._finish(entry, "length")


def _file_prompt_scores(share: Share, logits: Tensor) -> None:
    """Log-probabilities of the prompt tokens that these logits [new, vocab] predict."""
    entry, row = share.entry, share.row
    scores, num_top = entry.generation.prompt_logprobs, entry.generation.request.prompt_logprobs
    assert scores is not None and num_top is not None
    if row.start == 0:  # also where it was thrown out half-way and begins anew
        scores[:] = [TokenLogprobs(None)]
    targets = entry.ids[row.start + 1 : min(row.start + len(row.ids) + 1, entry.num_prompt)]
    if not targets:
        return
    scores += many_logprobs(logits[: len(targets)], targets, [num_top] * len(targets))
