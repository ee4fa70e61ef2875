"""Why the engine does not take a request."""

from __future__ import annotations

from mtnlg.config.errors import MtnlgError


class QueueFullError(MtnlgError):
    """The engine has as many requests waiting as it may."""


class EngineClosedError(MtnlgError):
    """The engine takes no more requests: it was closed, or an error of its own stopped it."""
