"""What launched ranks run in the tests of the launcher; light, for each launch imports it anew."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType

from mtnlg.config.errors import DataError


def rank_and_threads(factor: int) -> tuple[int, int, str]:
    import torch

    return factor * int(os.environ["RANK"]), torch.get_num_threads(), os.environ["WORLD_SIZE"]


def misbehave(how: str) -> None:
    if os.environ["RANK"] == "1":
        if how == "user":
            raise DataError("poems.bin: cut short at byte 12")
        if how == "bug":
            raise ZeroDivisionError("an honest mistake")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop_when_told(folder: str) -> list[int]:
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    (Path(folder) / os.environ["RANK"]).touch()
    deadline = time.monotonic() + 60
    while not received and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # "finish the step and save": and see whether a second signal comes
    (Path(folder) / f"saved-{os.environ['RANK']}").touch()
    return received


def do_not_listen(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (Path(folder) / os.environ["RANK"]).touch()
    time.sleep(60)
