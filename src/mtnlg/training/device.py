"""Which kind of device to use; apart from the loop, so that other verbs need not import all of training."""

from __future__ import annotations

import torch

from mtnlg.config import ConfigError


def choose_device(wanted: str | None) -> str:
    """``cpu`` or ``cuda``: what is asked for, or the best that is present.

    Raises:
        ConfigError: a GPU is asked for and none is usable.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is cuda: torch sees no GPU here. Use training.device: cpu.")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")
