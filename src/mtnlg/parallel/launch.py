"""Starting the ranks of a layout on this machine, or joining those that a launcher has started.

``mtnlg train`` on a laptop needs no launcher: the ranks are started here through torch's elastic
agent. Under ``torchrun``, or ``srun`` with one task per rank, this process already is a rank.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mtnlg.config import LayoutConfig
from mtnlg.config import errors as user_errors
from mtnlg.config.errors import MtnlgError, TrainingError
from mtnlg.parallel.mesh import ranks_present, resolve_layout

FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_STOP = 10  # what ranks get to end after one of them has failed


def launch(
    worker: Callable[..., Any],
    layout: LayoutConfig,
    args: tuple[Any, ...] = (),
    device_type: str = "cpu",
    num_threads: int | None = None,
) -> Any:
    """Run ``worker(*args)`` on every rank of ``layout`` and return what rank 0 returns.

    One rank, or a process that a launcher has started as a rank, runs ``worker`` right here. Ctrl-C
    and SIGTERM are passed on to the ranks, which decide how to end; the caller knows its own exit
    code. Ranks cannot outlive this process.

    Args:
        worker: a function of a module (ranks import it), which calls ``build_mesh`` itself.
        layout: the layout asked for.
        args: picklable arguments.
        device_type: ``cpu`` or ``cuda``.
        num_threads: CPU threads of one rank; ``None`` divides the cores over the ranks.

    Raises:
        ConfigError: the layout does not fit the ranks or devices that are there.
        MtnlgError: what the first failing rank raised, where a user's input caused it.
        TrainingError: a rank failed otherwise or died; the message has its number and trace.
    """
    join_slurm()
    layout = resolve_layout(layout, device_type)
    size = layout.num_ranks
    present = ranks_present()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if present else size
    num_threads = num_threads or max(1, (os.cpu_count() or 1) // local_ranks)
    if size == 1 or present is not None:
        if size > 1:
            _use_threads(num_threads)
        return worker(*args)
    with tempfile.TemporaryDirectory(prefix="mtnlg-ranks-") as folder:
        return _start_ranks(worker, args, size, num_threads, Path(folder))


def _start_ranks(
    worker: Callable[..., Any], args: tuple[Any, ...], size: int, num_threads: int, reports: Path
) -> Any:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told below, once
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=f"mtnlg-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",  # the others are ours: the agent would kill the ranks
        shutdown_timeout=SECONDS_TO_STOP,
    )
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # read when the ranks import torch
    try:
        with _pass_signals_on():
            results = elastic_launch(config, _run_rank)(
                worker, args, num_threads, str(reports), os.getpid()
            )
    except ChildFailedError as error:
        raise _first_failure(reports, error) from None
    return results[0]


def _run_rank(
    worker: Callable[..., Any], args: tuple[Any, ...], num_threads: int, reports: str, parent: int
) -> Any:
    """What each started rank runs. Errors go into a file: only it survives the agent's clean-up."""
    with suppress(OSError):
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the ranks once, through the parent
    end_with_parent(parent)
    _use_threads(num_threads)
    rank = int(os.environ["RANK"])
    try:
        result = worker(*args)
    except BaseException as error:
        report = {
            "rank": rank,
            "time": time.time(),
            "error": type(error).__name__,
            "message": str(error),
            "is_users": isinstance(error, MtnlgError),
            "trace": traceback.format_exc(),
        }
        (Path(reports) / f"{rank}.json").write_text(json.dumps(report), encoding="utf-8")
        sys.exit(1)
    return result if rank == 0 else None


def end_with_parent(parent: int) -> None:
    """Kill this process when the one with the id ``parent`` is gone, however it went."""
    import threading

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _use_threads(num_threads: int) -> None:
    import torch

    torch.set_num_threads(num_threads)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """While inside, environment variables that processes started here read as they begin."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _pass_signals_on() -> Iterator[list[int]]:
    """While inside, send SIGINT and SIGTERM to the ranks instead of ending this process.

    A second Ctrl-C kills them: a rank that waits for another one inside of C++ hears no signals.
    """
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        at_once = number == signal.SIGINT and bool(received)
        received.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL if at_once else number)
        if at_once:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, pass_on) for number in FORWARDED_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(reports: Path, error: Any) -> MtnlgError:
    """The error of the rank that failed first; the others usually fail because of it."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in reports.glob("*.json")]
    died = [failure for failure in error.failures.values() if failure.exitcode < 0]
    if died:
        first = min(died, key=lambda failure: failure.timestamp)
        name = signal.Signals(-first.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return TrainingError(f"rank {first.local_rank} died of {name}{hint}; the other ranks were ended.")
    if not found:
        return TrainingError(f"a rank ended without saying why: {error}")
    first = min(found, key=lambda report: (not report["is_users"], report["time"]))
    kind = getattr(user_errors, first["error"], None)
    if first["is_users"] and kind is not None:
        return kind(first["message"])
    return TrainingError(f"rank {first['rank']} failed:\n{first['trace']}")


def join_slurm(environment: Mapping[str, str] | None = None) -> None:
    """Under ``srun`` with one task per rank, set the variables that torch reads.

    Args:
        environment: read from here; ``None`` is ``os.environ``, which is written either way.
    """
    environment = os.environ if environment is None else environment
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or int(tasks) == 1 or "SLURM_PROCID" not in environment:
        return
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "localhost")
    port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
    os.environ.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment.get("SLURM_LOCALID", "0"),
        MASTER_ADDR=environment.get("MASTER_ADDR", first_node(nodes)),
        MASTER_PORT=environment.get("MASTER_PORT", str(port)),
    )


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list: ``gpu[003-007,9],cpu1`` → ``gpu003``."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
