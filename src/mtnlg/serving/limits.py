"""How much a key may ask for: requests and tokens a minute, and requests at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mtnlg.serving.errors import rate_limited

MINUTE = 60.0  # seconds
Clock = Callable[[], float]


class Bucket:
    """A minute's share that fills up steadily: a key that was quiet may use it up at once.

    Args:
        per_minute: how much; 0 is without limit.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Clock = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._left, self._seen = float(per_minute), clock()

    @property
    def left(self) -> float:
        """What may be used now; below 0 after a request took more than was foreseen."""
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._seen) * self.per_minute / MINUTE)
        self._seen = now
        return self._left

    def take(self, amount: float) -> float:
        """Use ``amount``; where there is not so much, take nothing and say in how many seconds there is."""
        if not self.per_minute:
            return 0.0
        missing = amount - self.left
        if missing > 0:
            return missing * MINUTE / self.per_minute
        self._left -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """What was taken and not used; a negative amount was used and not taken."""
        if self.per_minute:
            self._left = min(self.per_minute, self.left + amount)

    @property
    def reset_seconds(self) -> float:
        """Until it is full again."""
        return max(0.0, (self.per_minute - self.left) * MINUTE / self.per_minute)


@dataclass(frozen=True)
class Allowance:
    """Limits of a key; 0 is none.

    Args:
        requests_per_minute: requests that do work.
        tokens_per_minute: of prompts and answers together.
        concurrency: requests that are worked on at a time.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrency: int = 0


class Caller:
    """Whoever uses one key, and what is left of its share.

    Args:
        name: how logs call it.
        allowance: its limits.
        clock: seconds.
    """

    def __init__(self, name: str, allowance: Allowance, clock: Clock = time.monotonic) -> None:
        self.name, self.allowance = name, allowance
        self.requests = Bucket(allowance.requests_per_minute, clock)
        self.tokens = Bucket(allowance.tokens_per_minute, clock)
        self.num_active = 0

    def enter(self) -> None:
        """Begin a request; :meth:`leave` must follow.

        Raises:
            ApiError: 429, a limit is reached; ``Retry-After`` says when to come again.
        """
        limit = self.allowance.concurrency
        if limit and self.num_active >= limit:
            message = (
                f"Concurrency limit reached for {self.name}: Limit {limit}, running {self.num_active}. "
                "Wait for an answer before you send the next request."
            )
            raise rate_limited(message, "requests", 1.0)
        if wait := self.requests.take(1):
            raise self._refused(self.requests, "requests", "RPM", 1, wait)
        self.num_active += 1

    def leave(self) -> None:
        """End a request."""
        self.num_active -= 1

    def charge(self, num_tokens: int) -> None:
        """Take the tokens that a request may need.

        Raises:
            ApiError: 429, there are not so many left, or there never are.
        """
        limit = self.tokens.per_minute
        if limit and num_tokens > limit:
            message = (
                f"Request too large for {self.name} on tokens per min (TPM): Limit {limit}, Requested "
                f"{num_tokens}. The prompt or the wanted output must be reduced."
            )
            raise rate_limited(message, "tokens", None)
        if wait := self.tokens.take(num_tokens):
            raise self._refused(self.tokens, "tokens", "TPM", num_tokens, wait)

    def check(self, num_tokens: int) -> None:
        """Raise what :meth:`charge` would, and take nothing."""
        self.charge(num_tokens)
        self.tokens.give_back(num_tokens)

    def _refused(self, bucket: Bucket, what: str, short: str, amount: int, wait: float) -> Exception:
        used = round(bucket.per_minute - bucket.left)
        message = (
            f"Rate limit reached for {self.name} on {what} per min ({short}): Limit {bucket.per_minute}, "
            f"Used {used}, Requested {amount}. Please try again in {as_duration(wait)}."
        )
        return rate_limited(message, what, wait)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """``x-ratelimit-*`` for the limits there are."""
        found = []
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket.per_minute:
                values = {
                    "limit": str(bucket.per_minute),
                    "remaining": str(max(0, int(bucket.left))),
                    "reset": as_duration(bucket.reset_seconds),
                }
                found += [
                    (f"x-ratelimit-{key}-{what}".encode(), value.encode()) for key, value in values.items()
                ]
        return found


def as_duration(seconds: float) -> str:
    """As OpenAI writes it: ``120ms``, ``8.64s``, ``1m30s``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < MINUTE:
        return f"{round(seconds, 2):g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
