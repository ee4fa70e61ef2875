"""From a C++ source to a library. Several compile at once, beside whatever else the program does."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from mtnlg.native.cache import PART, folder_to_write, kept, remove_old

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
_OWN_FLAGS = re.compile(r"^// flag: (-\S+)$", re.MULTILINE)  # in a source: what it wants besides
COMPILING_SECONDS = 300
WAITING_SECONDS = 0.005


class NoCompilerError(OSError):
    """This machine has no C++ compiler."""


class _Work:
    """A compiler at work, on one library after another; a program that ends meanwhile ends it too.

    Args:
        compiler: its command.
        jobs: source and library of each; a library is there whole or not at all.
        locks: held until the end.
    """

    def __init__(self, compiler: str, jobs: Sequence[tuple[Path, Path]], locks: Sequence[IO[str]]) -> None:
        self._parts, self._locks, commands = list[str](), locks, list[str]()
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        for source, target in jobs:
            kernel = target.name.rpartition("-")[0]
            handle, part = tempfile.mkstemp(prefix=f"{kernel}{PART}", suffix=".so", dir=target.parent)
            os.close(handle)
            self._parts.append(part)
            flags = [*FLAGS, *_OWN_FLAGS.findall(source.read_text(encoding="utf-8"))]
            make = shlex.join([*shlex.split(compiler), *flags, str(source), "-o", part])
            commands.append(f"{make} && mv {shlex.join([part, str(target)])}")
        self._failure: OSError | None = None
        # Ctrl-C interrupts the main thread only: there it could lose a process that has just begun.
        thread = threading.Thread(target=self._start, args=("; ".join(commands),))
        thread.start()
        thread.join()
        if self._failure is not None:
            raise self._failure

    def _start(self, script: str) -> None:
        try:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                start_new_session=True,  # its parts end with it
            )
            atexit.register(self._end)
        except OSError as error:
            self._clear()
            self._failure = error

    @property
    def is_over(self) -> bool:
        """Whether it has done what it can; it is then cleared away."""
        if self._process.poll() is not None and not self._messages.closed:
            self._end()
        return self._process.returncode is not None

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            subprocess.SubprocessError: the compiler failed; its first complaint is the message.
        """
        try:
            if self._process.wait(COMPILING_SECONDS):
                raise subprocess.SubprocessError(self._complaint())
        finally:
            self._end()

    def _end(self) -> None:
        atexit.unregister(self._end)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._clear()

    def _clear(self) -> None:
        for part in self._parts:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        self._messages.close()
        for lock in self._locks:
            lock.close()

    def _complaint(self) -> str:
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
        return f"the C++ compiler failed: {first.strip()}"


_running: dict[str, _Work] = {}
_guard = threading.Lock()


def begin(sources: Mapping[Path, Sequence[str]]) -> None:
    """Have libraries made that will be wanted soon; :func:`library` waits for them, and says what failed.

    Nothing happens for those that are there, that cannot be made, or that another process makes.

    Args:
        sources: C++ files, those that take longest first, and what each needs (:func:`library`).
    """
    jobs = []
    with contextlib.suppress(OSError), _guard:
        for source, needed in sources.items():
            with contextlib.suppress(OSError):
                compiler, name = _compiler(source, needed)
                if kept(name) is None and name not in _running:
                    target = folder_to_write() / name
                    lock = _acquire(target)
                    if lock is not None:
                        jobs.append((source, target, lock))
        at_once = _num_cores()
        for mine in (jobs[first::at_once] for first in range(min(at_once, len(jobs)))):
            work = _Work(
                compiler, [(source, target) for source, target, _ in mine], [job[2] for job in mine]
            )
            _running.update({target.name: work for _, target, _ in mine})


def is_busy() -> bool:
    """Whether compilers that :func:`begin` began are at work."""
    return not all(work.is_over for work in list(_running.values()))


def library(source: Path, needed: Sequence[str] = ()) -> Path:
    """The compiled file, from the cache or new, which takes some seconds.

    Args:
        source: a C++ file; what it includes in quotation marks lies beside it.
        needed: instructions that the processor must have, as Linux names them.

    Raises:
        OSError: this machine cannot have it; the message says why.
        NoCompilerError: for want of a compiler.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler, name = _compiler(source, needed)
    ends = time.monotonic() + COMPILING_SECONDS
    while (found := kept(name)) is None:
        running = _running.get(name)
        if running is None or running.is_over:
            target = folder_to_write() / name
            lock = _acquire(target)
            if kept(name) is None and (lock is not None or time.monotonic() > ends):
                _Work(compiler, [(source, target)], [lock] if lock else []).finish()
                remove_old(target.parent, target)
                return target
            elif lock is not None:
                lock.close()
        time.sleep(WAITING_SECONDS)  # for this process's own work, or another's
    return found


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compiler(source: Path, needed: Sequence[str]) -> tuple[str, str]:
    """The compiler to use, and the library's name, which says all that it is made of."""
    features = processor()
    lacking = [name for name in needed if name not in features.split()]
    if lacking:
        raise OSError(f"the processor does not say that it has {', '.join(lacking)}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError(
            "there is no C++ compiler: install g++ (apt-get install g++, dnf install gcc-c++)"
        )
    made_by = f"{features}{compiler}{FLAGS}{platform.libc_ver()}"
    key = hashlib.sha256(_text(source) + made_by.encode()).hexdigest()
    return compiler, f"{source.stem}-{key[:16]}.so"


def _text(source: Path) -> bytes:
    """A source with all that it includes from beside it."""
    text = source.read_bytes()
    included = re.findall(rb'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)
    return text + b"".join(_text(source.parent / os.fsdecode(name)) for name in included)


def _acquire(target: Path) -> IO[str] | None:
    """The right to make a library: processes that start together make each once.

    Returns:
        Holds it until it is closed; ``None`` if another process has it.
    """
    kernel = target.name.rpartition("-")[0]
    lock = open(target.with_name(f".{kernel}.lock"), "a")  # noqa: SIM115 - held while the compiler works
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except (ImportError, OSError):  # a system or a file system without locks: making it twice is harmless
        return lock
    return lock


def processor() -> str:
    """The processor's name and its instructions, as Linux tells them; empty elsewhere."""
    if not sys.platform.startswith("linux"):
        return ""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines}
    return f"{wanted.get('model name', '')} {wanted.get('flags', '')}"
