"""The errors a user can cause: each says what was wrong, where, and what to do.

The command line prints these without a stack trace. Anything else that escapes is a bug of ours
and keeps its trace.
"""

from __future__ import annotations

from collections.abc import Sequence


class MtnlgError(Exception):
    """Base of every error that a user's input, files or machine can cause."""


class ConfigError(MtnlgError, ValueError):
    """One or more settings are wrong; all of them are named at once.

    Args:
        problems: one sentence per problem, each naming the field, its value and what is valid.
    """

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(MtnlgError, ValueError):
    """A document, token file or tokenizer cannot be used; the message names the file and place."""


class CheckpointError(MtnlgError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another model."""


class TrainingError(MtnlgError, RuntimeError):
    """Training cannot go on (too many non-finite steps, a dead rank, ...)."""


class RankError(MtnlgError, RuntimeError):
    """Another rank of the model has ended or does not answer, so the model can compute nothing more."""


class NotYetError(MtnlgError, NotImplementedError):
    """A setting that the config already names and this version cannot do yet."""
