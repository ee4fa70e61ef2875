"""The processes that share the tasks of an encoding job."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtnlg.config import errors
from mtnlg.config.errors import DataError
from mtnlg.config.progress import Progress
from mtnlg.tokens.encode_plan import Plan
from mtnlg.tokens.encode_task import Counts, EncodeSettings, Encoding
from mtnlg.tokens.encode_worker import setup_message, task_message
from mtnlg.tokens.tokenizer import FILE_NAME, Tokenizer

_INLINE_BYTES = 1 << 20  # less than this is encoded here: a process would take longer to start


def run_tasks(
    plan: Plan,
    tasks: Sequence[int],
    folder: Path,
    tokenizer: Tokenizer,
    settings: EncodeSettings,
    workers: int,
    progress: Progress,
    done_bytes: int = 0,
) -> None:
    """Make the parts ``folder/NUMBER`` of the tasks named.

    Args:
        plan: what each task reads.
        tasks: numbers of the tasks to do.
        folder: holds the tokenizer's file and takes the parts.
        tokenizer: gives the ids.
        settings: of the job.
        workers: processes.
        progress: told the bytes read.
        done_bytes: read by an earlier run.

    Raises:
        DataError: a source cannot be read, or a worker was killed. Finished parts stay.
    """
    if not tasks:
        return
    counts = Counts(disk_bytes=done_bytes)
    if plan.num_bytes < _INLINE_BYTES:
        encoding = Encoding(tokenizer, settings)
        for number in tasks:
            encoding.run(plan.tasks[number], _prefix(folder, number), {"job": plan.key}, lambda _: None)
        return
    with _Pool(workers, setup_message(str(folder / FILE_NAME), settings)) as pool:
        left = iter(tasks)
        running = sum(_assign(pool, worker, left, plan, folder) for worker in range(workers))
        while running:
            worker, message = pool.next_message()
            if "progress" in message:
                counts.add(message["progress"])
                progress("encoding", counts.disk_bytes, plan.num_bytes, "bytes")
            elif "done" in message:
                running -= 1
                running += _assign(pool, worker, left, plan, folder)
            else:
                _raise(message)


def _assign(pool: _Pool, worker: int, left: Any, plan: Plan, folder: Path) -> int:
    """Give ``worker`` the next task, if there is one; how many it got."""
    number = next(left, None)
    if number is None:
        return 0
    pool.send(worker, task_message(number, plan.tasks[number], _prefix(folder, number), {"job": plan.key}))
    return 1


def _prefix(folder: Path, number: int) -> str:
    return str(folder / f"{number:06d}")


def _raise(message: dict[str, Any]) -> None:
    kind, problem = message["kind"], message["problem"]
    if kind == "OSError":
        raise OSError(message["errno"], problem, message["file"])
    if kind == "bug":
        raise RuntimeError(f"a worker of the encoding failed:\n{problem}")
    raise getattr(errors, kind, DataError)(problem)


class _Pool:
    """Worker processes, each with a thread that passes its messages on."""

    def __init__(self, workers: int, setup: str) -> None:
        self._messages: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
        self._processes = [_start() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._listen, args=(number,), daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        for number in range(workers):
            self.send(number, setup)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        for thread in self._threads:
            thread.join()

    def send(self, worker: int, message: str) -> None:
        """Write a line to a worker; one that has died is reported by its listener."""
        pipe = self._processes[worker].stdin
        try:
            pipe.write(message)  # type: ignore[union-attr]
            pipe.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            return

    def next_message(self) -> tuple[int, dict[str, Any]]:
        """Wait for the next message of any worker."""
        return self._messages.get()

    def _listen(self, worker: int) -> None:
        process = self._processes[worker]
        for line in process.stdout or ():
            self._messages.put((worker, json.loads(line)))
        code = process.wait()
        problem = (
            f"a worker of the encoding ended with code {code} (was it killed, or is memory short?): "
            "run the same command again, it goes on from the finished parts."
        )
        self._messages.put((worker, {"problem": problem, "kind": "DataError"}))


def _start() -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAYON_NUM_THREADS": "1",  # one core each: the processes are the parallelism
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "mtnlg.tokens.encode_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
    )
