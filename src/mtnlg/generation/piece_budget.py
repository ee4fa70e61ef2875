"""How many prompt tokens a step may take beside the tokens of others, from what steps have taken."""

from __future__ import annotations

STRETCH = 1.5  # a piece beside running answers may take so many times a step without one
FEWEST = 16  # tokens: shorter pieces attend one by one, and cost as much as these
FEW = 8  # tokens of a piece that say little of what one takes
SHARE = 0.1  # of a new observation in the mean
FARTHEST = 4.0  # times the mean: whatever else happened on the machine counts so much at most


class PieceBudget:
    """Keeps a prompt's pieces so short that others hardly wait longer for their next token.

    Where a step takes as long with a piece as without, as on a GPU with few tokens, pieces are as large as
    they may be; where each token takes its time, as on a CPU, they are cut.

    Args:
        most: tokens, of all prompts of a step together.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._step_seconds = self._token_seconds = 0.0  # 0 is not yet known

    def room(self, num_generating: int, num_unfinished: int) -> int:
        """Prompt tokens for the next step.

        Args:
            num_generating: answers whose next token waits for the step's end.
            num_unfinished: prompts; where more wait for their first token than for their next, a piece may
                be longer.
        """
        if not (num_generating and self._step_seconds and self._token_seconds):
            return self.most
        seconds = STRETCH * self._step_seconds * max(1.0, num_unfinished / num_generating)
        tokens = int(seconds / self._token_seconds) // FEWEST * FEWEST
        return min(self.most, max(tokens, FEWEST))

    def note(self, seconds: float, num_prompt_tokens: int, num_generating: int) -> None:
        """What the model took for a step."""
        if not num_prompt_tokens:
            if num_generating:
                self._step_seconds = _mean(self._step_seconds, seconds)
        elif num_prompt_tokens >= FEW and (self._step_seconds or not num_generating):
            beside = self._step_seconds if num_generating else 0.0
            each = max(seconds - beside, 0.01 * seconds) / num_prompt_tokens
            self._token_seconds = _mean(self._token_seconds, each)


def _mean(so_far: float, new: float) -> float:
    """The running mean; the first observation is one."""
    if not so_far:
        return new
    return so_far + SHARE * (min(new, FARTHEST * so_far) - so_far)
