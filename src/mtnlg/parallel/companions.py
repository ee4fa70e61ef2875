"""The other ranks of a program that people talk to: this process is rank 0 and starts them.

:mod:`mtnlg.parallel.launch` starts all ranks as children, which have no terminal. Here rank 0 keeps the
terminal, or the sockets, and its companions are processes that listen to nothing but it: not to Ctrl-C,
which stops an answer. They end with it, however it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtnlg.config.errors import MtnlgError, RankError
from mtnlg.parallel.launch import end_with_parent

START_SECONDS = 180.0  # in which a process imports torch and says that it is there
END_SECONDS = 10.0  # in which it ends by itself
POLL_SECONDS = 0.05


class Companions:
    """Processes that are ranks 1, 2, ... of this machine.

    Args:
        command: starts one; its last argument becomes what :func:`serve_as_companion` reads.
        size: ranks with this process.
        settings: for the companions, plain values.
        num_threads: of each.
        timeout_seconds: after which a rank that does not answer is given up.
    """

    def __init__(
        self,
        command: Sequence[str],
        size: int,
        settings: dict[str, Any],
        num_threads: int,
        timeout_seconds: float,
    ) -> None:
        self.size, self.timeout_seconds = size, timeout_seconds
        self._folder = tempfile.TemporaryDirectory(prefix="mtnlg-ranks-")
        self._timeout = timedelta(seconds=timeout_seconds)
        self._store = dist.TCPStore(
            "127.0.0.1", 0, size, is_master=True, timeout=self._timeout, wait_for_workers=False
        )
        self._is_ending = False
        common = {
            "size": size,
            "port": self._store.port,
            "timeout_seconds": timeout_seconds,
            "num_threads": num_threads,
            "reports": self._folder.name,
            "parent": os.getpid(),
            "settings": settings,
        }
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        self._processes = {
            rank: subprocess.Popen(
                [*command, json.dumps({**common, "rank": rank})],
                env={**environment, "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is for rank 0
            )
            for rank in range(1, size)
        }

    def join(self, backend: str) -> None:
        """Wait until all are there, and make the process group.

        Raises:
            RankError: one has ended, or did not come.
        """
        deadline = time.monotonic() + START_SECONDS
        names = [_present(rank) for rank in self._processes]
        while not self._store.check(names):
            if (reason := self.what_happened()) is not None:
                self.end()
                raise RankError(reason)
            if time.monotonic() > deadline:
                self.end()
                raise RankError(f"the other ranks did not start within {START_SECONDS:.0f} s.")
            time.sleep(POLL_SECONDS)
        dist.init_process_group(
            backend, store=self._store, rank=0, world_size=self.size, timeout=self._timeout
        )

    def what_happened(self) -> str | None:
        """Which rank has ended and why, in a sentence; ``None`` while all live."""
        ended = {rank: code for rank, process in self._processes.items() if (code := process.poll())}
        if self._is_ending or not ended:
            return None
        reports = [json.loads(path.read_text()) for path in Path(self._folder.name).glob("*.json")]
        for report in sorted(reports, key=lambda item: (not item["is_users"], item["time"])):
            if report["is_users"]:
                return str(report["message"])
            if not report["is_of_connection"]:
                return f"rank {report['rank']} failed:\n{report['trace']}"
        # Those that were killed are why others lost their connection.
        rank, code = min(ended.items(), key=lambda item: item[1])
        if code >= 0:
            return f"rank {rank} ended with exit code {code}; the other ranks were ended."
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"rank {rank} died of {name}{hint}; the other ranks were ended."

    def end(self, seconds: float = 0.0) -> None:
        """Let the processes end for so long, then kill them."""
        self._is_ending = True
        deadline = time.monotonic() + seconds
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()


def serve_as_companion(content: str, work: Callable[[dict[str, Any]], None], backend: str) -> int:
    """What a companion's process does: join the others, ``work(settings)``, report what goes wrong.

    Args:
        content: as :class:`Companions` wrote it.
        work: what this rank is for.
        backend: of the process group.

    Returns:
        The exit code.
    """
    told = json.loads(content)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(told["parent"])
    torch.set_num_threads(told["num_threads"])
    rank = told["rank"]
    with _reported(Path(told["reports"]) / f"{rank}.json", rank):
        timeout = timedelta(seconds=told["timeout_seconds"])
        store = dist.TCPStore("127.0.0.1", told["port"], told["size"], is_master=False, timeout=timeout)
        store.set(_present(rank), "yes")
        dist.init_process_group(backend, store=store, rank=rank, world_size=told["size"], timeout=timeout)
        work(told["settings"])
        return 0
    return 1


@contextlib.contextmanager
def _reported(path: Path, rank: int) -> Iterator[None]:
    """Write an error into a file: rank 0 tells it, once."""
    try:
        yield
    except Exception as error:
        report = {
            "rank": rank,
            "time": time.time(),
            "message": str(error),
            "is_users": isinstance(error, MtnlgError) and not isinstance(error, RankError),
            "is_of_connection": isinstance(error, RankError) or is_of_connection(error),
            "trace": traceback.format_exc(),
        }
        with contextlib.suppress(OSError):  # rank 0 has gone and cleaned up
            path.write_text(json.dumps(report), encoding="utf-8")


def is_of_connection(error: BaseException) -> bool:
    """Whether an error of torch's says that another rank is gone or silent."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "store")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _present(rank: int) -> str:
    return f"present/{rank}"


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
