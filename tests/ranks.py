"""Real gloo ranks for tests: processes that are started once and run function after function.

    def test_sum(ranks):
        assert ranks.run(2, workers.sum_of_ranks, 10) == [11, 11]

The function must live in an importable module (it travels by name), gets the arguments as they are
and returns something picklable. A rank that fails or hangs fails the test with the stack traces of all
ranks, and the next call starts fresh processes.

Each number of ranks has processes of its own, and their process groups live as long as they do: torch
caches what it knows of a mesh by its ranks, so groups must not be taken down under it. Make meshes
with ``workers.mesh_of``, which makes each only once. One rank is the test's own process.
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
IMPORTED_FROM = (str(ROOT), str(ROOT / "src"))
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
    """Processes that run functions as ranks, started when a number of ranks is first asked for."""

    def __init__(self) -> None:
        self._worlds: dict[int, list[_Rank]] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="mtnlg-ranks-"))
        self._starts = 0

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """Call ``function(*args)`` on ``size`` ranks with the default process group initialised.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: a rank raised, died, or did not answer within ``timeout`` seconds.
        """
        if size == 1:
            return [function(*args)]
        if size not in self._worlds:
            self._start_world(size)
        name = f"{function.__module__}:{function.__qualname__}"
        for worker in self._worlds[size]:
            worker.connection.send_bytes(pickle.dumps((name, args)))
        return self._collect(size, time.monotonic() + timeout, name)

    def close(self) -> None:
        """End the processes."""
        for size in list(self._worlds):
            self._end_world(size)

    def _end_world(self, size: int) -> None:
        for worker in self._worlds.pop(size):
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()

    def _start_world(self, size: int) -> None:
        """Start ranks side by side and wait until they are ready: a call's time is its own."""
        self._starts += 1
        store = self._folder / f"store-{self._starts}"
        self._worlds[size] = [self._start(rank, size, store) for rank in range(size)]
        for worker in self._worlds[size]:
            if not worker.connection.poll(START_SECONDS):
                self._end_world(size)
                raise RankError(f"the ranks did not start within {START_SECONDS:.0f} s")
            worker.connection.recv_bytes()

    def _start(self, rank: int, size: int, store: Path) -> _Rank:
        ours, theirs = Pipe()
        stack_file = self._folder / f"stack-{self._starts}-{rank}"
        command = "import sys; from tests.ranks import serve; serve(*sys.argv[1:])"
        arguments = [theirs.fileno(), os.getpid(), stack_file, store]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(IMPORTED_FROM)}
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        process = subprocess.Popen(
            [sys.executable, "-c", command, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        return _Rank(process, ours, stack_file)

    def _collect(self, size: int, deadline: float, name: str) -> list[Any]:
        world = self._worlds[size]
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < size and time.monotonic() < deadline:
            for rank in set(range(size)) - set(results) - set(errors):
                connection = world[rank].connection
                try:
                    if connection.poll(0.005):
                        answer, value = pickle.loads(connection.recv_bytes())
                        (results if answer == "result" else errors)[rank] = value
                except (EOFError, OSError):
                    errors[rank] = f"the process ended with code {world[rank].process.wait()}"
            if errors:  # the others may wait for the failed one for ever
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == size:
            return [results[rank] for rank in range(size)]
        waiting = set(range(size)) - set(results) - set(errors)
        report = [f"--- rank {rank} failed\n{errors[rank]}" for rank in sorted(errors)]
        report += [f"--- rank {rank} still running at\n{world[rank].stack()}" for rank in waiting]
        self._end_world(size)
        raise RankError(f"{name} on {size} ranks:\n" + "\n".join(report))


def serve(descriptor: str, parent: str, stack_file: str, store: str) -> None:
    """Run what the test process sends, until it closes the connection."""
    with Path(stack_file).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        connection = Connection(int(descriptor))
        import torch
        import torch.distributed as dist

        from mtnlg.parallel.launch import end_with_parent

        end_with_parent(int(parent))
        torch.set_num_threads(1)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        connection.send_bytes(b"ready")
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                connection.send_bytes(pickle.dumps(_answer(*pickle.loads(connection.recv_bytes()))))


def _answer(name: str, args: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        module, _, function_name = name.partition(":")
        return "result", getattr(importlib.import_module(module), function_name)(*args)
    except Exception:
        return "error", traceback.format_exc()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """The shared pool of ranks."""
    pool = RankPool()
    yield pool
    pool.close()
