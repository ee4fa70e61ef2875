"""When a run ends, how far it has come, and what it stops for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mtnlg.config import StopConfig


@dataclass
class Position:
    """Where a run stands.

    Args:
        step: optimizer steps done, skipped ones included.
        tokens: tokens trained on.
        seconds: wall time spent in training, over all parts of a resumed run.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class StopRules:
    """The limits of a run; the first one reached ends it.

    Args:
        config: tokens, steps, minutes, patience and margin.
        tokens_after_steps: tokens seen once ``config.steps`` steps are done (the batch ramp decides).
    """

    def __init__(self, config: StopConfig, tokens_after_steps: int | None = None) -> None:
        self.config = config
        limits = [limit for limit in (config.tokens, tokens_after_steps) if limit is not None]
        self.total_tokens: int | None = min(limits) if limits else None
        self.best_loss = math.inf
        self.evaluations_without_improvement = 0

    def progress(self, position: Position) -> float:
        """Share of the run that is over, by the limit that is nearest."""
        shares = [0.0]
        if self.config.tokens is not None:
            shares.append(position.tokens / self.config.tokens)
        if self.config.steps is not None:
            shares.append(position.step / self.config.steps)
        if self.config.minutes is not None:
            shares.append(position.seconds / (60.0 * self.config.minutes))
        return min(1.0, max(shares))

    def reason(self, position: Position) -> str | None:
        """Why the run ends here, or ``None`` while it goes on."""
        config = self.config
        if config.tokens is not None and position.tokens >= config.tokens:
            return "tokens"
        if config.steps is not None and position.step >= config.steps:
            return "steps"
        if config.minutes is not None and position.seconds >= 60.0 * config.minutes:
            return "minutes"
        if config.patience and self.evaluations_without_improvement >= config.patience:
            return "convergence"
        return None

    def schedule_total(self, tokens: int, position: Position) -> float:
        """Tokens at which the learning rate's decay ends.

        With a limit in tokens or steps that is the limit. With minutes alone it is where the run would
        end at its average speed so far, so that the decay follows the share of time that is over.

        Args:
            tokens: tokens seen once the coming step is done.
            position: before that step.
        """
        if self.total_tokens is not None:
            return self.total_tokens
        share = self.progress(position)
        return tokens / share if share > 0.0 else math.inf

    def observe(self, loss: float) -> bool:
        """Take in one validation loss (nats a token); true if it improved by the margin."""
        if loss < self.best_loss - self.config.margin or math.isinf(self.best_loss):
            self.best_loss, self.evaluations_without_improvement = loss, 0
            return True
        self.evaluations_without_improvement += 1
        return False

    def state(self) -> dict[str, float | int | None]:
        """What a checkpoint keeps."""
        best = None if math.isinf(self.best_loss) else self.best_loss
        return {
            "best_loss": best,
            "evaluations_without_improvement": self.evaluations_without_improvement,
        }

    def load_state(self, state: dict[str, float | int | None]) -> None:
        """Go on from a checkpoint."""
        best = state.get("best_loss")
        self.best_loss = math.inf if best is None else float(best)
        self.evaluations_without_improvement = int(state.get("evaluations_without_improvement") or 0)
