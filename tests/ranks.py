"""Real gloo ranks for tests: processes that are started once and run function after function.

    def test_sum(ranks):
        assert ranks.run(2, workers.sum_of_ranks, 10) == [11, 11]

The function must live in an importable module (it travels by name), gets the arguments as they are
and returns something picklable. Each call has process groups of its own. A rank that fails or hangs
fails the test with the stack traces of all ranks, and the next call starts fresh processes.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 300.0
GRACE_SECONDS = 3.0


class RankError(AssertionError):
    """One or more ranks failed or hung; the message holds their traces."""


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    connection: Connection
    stack_file: Path

    def stack(self) -> str:
        """Where the rank is right now."""
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.stack_file.read_text() if self.stack_file.exists() else "(gone)"


class RankPool:
    """Processes that run functions as ranks; as many are started as the largest call needs."""

    def __init__(self) -> None:
        self._ranks: list[_Rank] = []
        self._folder = Path(tempfile.mkdtemp(prefix="mtnlg-ranks-"))
        self._calls = 0

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """Call ``function(*args)`` on ``size`` ranks with the default process group initialised.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: a rank raised, died, or did not answer within ``timeout`` seconds.
        """
        self._start_missing(size)
        self._calls += 1
        name = f"{function.__module__}:{function.__qualname__}"
        for rank, worker in enumerate(self._ranks[:size]):
            store = str(self._folder / f"store-{self._calls}")
            worker.connection.send_bytes(pickle.dumps((name, args, rank, size, store)))
        return self._collect(size, time.monotonic() + timeout, name)

    def close(self) -> None:
        """End the processes."""
        for worker in self._ranks:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self._ranks = []

    def _start_missing(self, size: int) -> None:
        """Start ranks side by side and wait until they have imported torch: a call's time is its own."""
        started = [self._start(index) for index in range(len(self._ranks), size)]
        self._ranks += started
        for worker in started:
            if not worker.connection.poll(START_SECONDS):
                self.close()
                raise RankError(f"the ranks did not start within {START_SECONDS:.0f} s")
            worker.connection.recv_bytes()

    def _start(self, index: int) -> _Rank:
        ours, theirs = Pipe()
        stack_file = self._folder / f"stack-{index}-{self._calls}"
        command = (
            f"from tests.ranks import serve; serve({theirs.fileno()}, {str(stack_file)!r}, {os.getpid()})"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", command], cwd=ROOT, env=environment, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        return _Rank(process, ours, stack_file)

    def _collect(self, size: int, deadline: float, name: str) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < size and time.monotonic() < deadline:
            for rank in set(range(size)) - set(results) - set(errors):
                connection = self._ranks[rank].connection
                try:
                    if connection.poll(0.005):
                        answer, value = pickle.loads(connection.recv_bytes())
                        (results if answer == "result" else errors)[rank] = value
                except (EOFError, OSError):
                    errors[rank] = f"the process ended with code {self._ranks[rank].process.wait()}"
            if errors:  # the others may wait for the failed one for ever
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == size:
            return [results[rank] for rank in range(size)]
        waiting = set(range(size)) - set(results) - set(errors)
        report = [f"--- rank {rank} failed\n{errors[rank]}" for rank in sorted(errors)]
        report += [f"--- rank {rank} still running at\n{self._ranks[rank].stack()}" for rank in waiting]
        self.close()
        raise RankError(f"{name} on {size} ranks:\n" + "\n".join(report))


def serve(descriptor: int, stack_file: str, parent: int) -> None:
    """Run what the test process sends, until it closes the connection."""
    with Path(stack_file).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        connection = Connection(descriptor)
        import torch

        from mtnlg.parallel.launch import end_with_parent

        end_with_parent(parent)
        torch.set_num_threads(1)
        connection.send_bytes(b"ready")
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                connection.send_bytes(pickle.dumps(_answer(*pickle.loads(connection.recv_bytes()))))


def _answer(name: str, args: tuple[Any, ...], rank: int, size: int, store: str) -> tuple[str, Any]:
    import torch.distributed as dist

    try:
        module, _, function_name = name.partition(":")
        function = getattr(importlib.import_module(module), function_name)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        try:
            return "result", function(*args)
        finally:
            dist.destroy_process_group()
    except Exception:
        return "error", traceback.format_exc()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The shared pool of ranks."""
    pool = RankPool()
    yield pool
    pool.close()
