"""Real gloo ranks for tests: processes that are started once and run function after function.

    def test_sum(ranks):
        assert ranks.run(2, workers.sum_of_ranks, 10) == [11, 11]

The function must live in an importable module (it travels by name), gets the arguments as they are
and returns something picklable. A rank that fails or hangs fails the test with the stack traces of all
ranks, and the next call starts fresh processes.

Each number of ranks has processes of its own, and their process groups live as long as they do: torch
caches what it knows of a mesh by its ranks, so groups must not be taken down under it. Make meshes
with ``workers.mesh_of``, which makes each only once. One rank is the test's own process.

Ranks are forked from one process that has imported torch, the nursery: importing it in each would take
longer than most tests. They compute on the CPU over gloo, or with ``MTNLG_TEST_DEVICE=cuda`` on as many
GPUs over NCCL.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import signal
import socket
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
JOBS_OF_A_WORLD = 30  # every group that a job makes leaves a thread that wakes a hundred times a second
GRACE_SECONDS = 3.0
IMPORTED_FIRST = ("mtnlg.parallel", "mtnlg.training.step", "mtnlg.training.checkpoints")


def device_type() -> str:
    """Where ranks compute: ``cpu`` or ``cuda``."""
    return os.environ.get("MTNLG_TEST_DEVICE", "cpu")


class RankError(AssertionError):
    """One or more ranks failed or hung; the message holds their traces."""


class _Nursery:
    """A process that has imported torch and forks ranks when asked."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(IMPORTED_FROM)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.ranks import nurse; nurse({theirs.fileno()})"],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def fork(self, descriptor: int, *arguments: Any) -> int:
        """A new rank, which serves over ``descriptor``; its process id."""
        socket.send_fds(self._socket, [pickle.dumps(arguments)], [descriptor])
        return self._answer()

    def exit_code(self, process_id: int) -> int:
        """That of a rank that has ended or is about to (negative: the signal that killed it)."""
        self._socket.send(pickle.dumps(process_id))
        return self._answer()

    def close(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()

    def _answer(self) -> int:
        answer = self._socket.recv(16)
        if not answer:
            raise RankError(f"the nursery of ranks ended with code {self.process.wait()}")
        return int(answer)


def nurse(descriptor: int) -> None:
    """Import what ranks need, then fork one for each request until the other side closes."""
    for name in IMPORTED_FIRST:
        importlib.import_module(name)
    requests = socket.socket(fileno=descriptor)
    codes: dict[int, int] = {}
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 4096, 1)
        if not message:
            os._exit(0)
        request = pickle.loads(message)
        if isinstance(request, int):
            if request not in codes:
                codes[request] = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
            answer = codes[request]
        else:
            answer = os.fork()
            if answer == 0:
                requests.close()
                serve(descriptors[0], *request)
                os._exit(0)
            os.close(descriptors[0])
        requests.send(str(answer).encode())


@dataclass
class _Rank:
    process_id: int
    connection: Connection
    stack_file: Path

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process_id, number)

    def stack(self) -> str:
        """Where the rank is right now."""
        self.signal(signal.SIGUSR1)
        time.sleep(0.2)
        return self.stack_file.read_text() if self.stack_file.exists() else "(gone)"


class RankPool:
    """Processes that run functions as ranks, started when a number of ranks is first asked for."""

    def __init__(self) -> None:
        self._worlds: dict[int, list[_Rank]] = {}
        self._jobs: dict[int, int] = {}  # that each world has done
        self._folder = Path(tempfile.mkdtemp(prefix="mtnlg-ranks-"))
        self._starts = 0
        self._nursery: _Nursery | None = None

    def run(self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """Call ``function(*args)`` on ``size`` ranks with the default process group initialised.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankError: a rank raised, died, or did not answer within ``timeout`` seconds.
        """
        if size == 1:
            return [function(*args)]
        if self._jobs.get(size, 0) >= JOBS_OF_A_WORLD:
            self.end_world(size)
        if size not in self._worlds:
            self._start_world(size)
        self._jobs[size] = self._jobs.get(size, 0) + 1
        name = f"{function.__module__}:{function.__qualname__}"
        for worker in self._worlds[size]:
            worker.connection.send_bytes(pickle.dumps((name, args)))
        return self._collect(size, time.monotonic() + timeout, name)

    def close(self) -> None:
        """End the processes."""
        for size in list(self._worlds):
            self.end_world(size)
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def end_world(self, size: int) -> None:
        """End the processes of one number of ranks, and with them what they hold in memory."""
        self._jobs.pop(size, None)
        for worker in self._worlds.pop(size, []):
            worker.signal(signal.SIGKILL)
            self._how_it_ended(worker)
            worker.connection.close()

    def _start_world(self, size: int) -> None:
        """Start ranks side by side and wait until they are ready: a call's time is its own."""
        self._starts += 1
        store = self._folder / f"store-{self._starts}"
        self._worlds[size] = [self._start(rank, size, store) for rank in range(size)]
        for worker in self._worlds[size]:
            if not worker.connection.poll(START_SECONDS):
                self.end_world(size)
                raise RankError(f"the ranks did not start within {START_SECONDS:.0f} s")
            worker.connection.recv_bytes()

    def _start(self, rank: int, size: int, store: Path) -> _Rank:
        if self._nursery is None:
            self._nursery = _Nursery()
        ours, theirs = Pipe()
        stack_file = self._folder / f"stack-{self._starts}-{rank}"
        process_id = self._nursery.fork(theirs.fileno(), rank, size, str(stack_file), str(store))
        theirs.close()
        return _Rank(process_id, ours, stack_file)

    def _how_it_ended(self, worker: _Rank) -> str:
        assert self._nursery is not None
        return f"the process ended with code {self._nursery.exit_code(worker.process_id)}"

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
                    errors[rank] = self._how_it_ended(world[rank])
            if errors:  # the others may wait for the failed one for ever
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if len(results) == size:
            return [results[rank] for rank in range(size)]
        waiting = set(range(size)) - set(results) - set(errors)
        report = [f"--- rank {rank} failed\n{errors[rank]}" for rank in sorted(errors)]
        report += [f"--- rank {rank} still running at\n{world[rank].stack()}" for rank in waiting]
        self.end_world(size)
        raise RankError(f"{name} on {size} ranks:\n" + "\n".join(report))


def serve(descriptor: int, rank: int, size: int, stack_file: str, store: str) -> None:
    """Be a rank: run what the test process sends, until it closes the connection."""
    import torch
    import torch.distributed as dist

    from mtnlg.parallel.launch import end_with_parent

    with Path(stack_file).open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        connection = Connection(descriptor)
        end_with_parent(os.getppid())
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        torch.set_num_threads(1)
        if device_type() == "cuda":
            torch.cuda.set_device(rank)
        backend = "nccl" if device_type() == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.FileStore(store, size), rank=rank, world_size=size)
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
