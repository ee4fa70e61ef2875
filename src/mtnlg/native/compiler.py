"""From a C++ source to a library. Several compile at once, beside whatever else the program does."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mtnlg.native.cache import PART, folder_to_write, kept, remove_old

FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
COMPILING_SECONDS = 300


class NoCompilerError(OSError):
    """This machine has no C++ compiler."""


class _Compilation:
    """A compiler at work; a program that ends meanwhile ends it too.

    Args:
        command: what to run, without the output's name.
        target: the library's path; it is there whole or not at all.
        lock: held until the end.
    """

    def __init__(self, command: Sequence[str], target: Path, lock: IO[str] | None) -> None:
        self._target, self._lock = target, lock
        kernel = target.name.rpartition("-")[0]
        handle, self._part = tempfile.mkstemp(prefix=f"{kernel}{PART}", suffix=".so", dir=target.parent)
        os.close(handle)
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
        self._failure: OSError | None = None
        # Ctrl-C interrupts the main thread only: there it could lose a process that has just begun.
        thread = threading.Thread(target=self._start, args=([*command, "-o", self._part],))
        thread.start()
        thread.join()
        if self._failure is not None:
            raise self._failure

    def _start(self, command: Sequence[str]) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                start_new_session=True,  # its parts end with it
            )
            atexit.register(self._end)
        except OSError as error:
            os.unlink(self._part)
            self._failure = error

    def finish(self) -> None:
        """Wait until the library is there.

        Raises:
            subprocess.SubprocessError: the compiler failed; its first complaint is the message.
        """
        try:
            if self._process.wait(COMPILING_SECONDS):
                raise subprocess.SubprocessError(self._complaint())
        finally:
            self._end()
        remove_old(self._target.parent, self._target)

    def _end(self) -> None:
        atexit.unregister(self._end)
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with contextlib.suppress(FileNotFoundError):
            if self._process.returncode == 0:
                os.replace(self._part, self._target)
            else:
                os.unlink(self._part)
        self._messages.close()
        _release(self._lock)

    def _complaint(self) -> str:
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")
        return f"the C++ compiler failed: {first.strip()}"


_running: dict[str, _Compilation] = {}
_guard = threading.Lock()


def begin(source: Path, needed: Sequence[str] = ()) -> None:
    """Have a library made that will be wanted soon; :func:`library` waits for it, and says what failed.

    Nothing happens where it is there, cannot be made, or another process makes it.

    Args:
        source: a C++ file; it may include the headers beside it.
        needed: instructions that the processor must have, as Linux names them.
    """
    with contextlib.suppress(OSError), _guard:
        compiler, name = _compiler(source, needed)
        if kept(name) is None and name not in _running:
            target = folder_to_write() / name
            lock = _acquire(target, waits=False)
            if lock is not None:
                _running[name] = _compile(compiler, source, target, lock)


def library(source: Path, needed: Sequence[str] = ()) -> Path:
    """The compiled file, from the cache or new, which takes some seconds.

    Args:
        source: see :func:`begin`.
        needed: likewise.

    Raises:
        OSError: this machine cannot have it; the message says why.
        NoCompilerError: for want of a compiler.
        subprocess.SubprocessError: the compiler failed.
    """
    compiler, name = _compiler(source, needed)
    with _guard:
        running = _running.pop(name, None)
    if running is not None:
        running.finish()
    found = kept(name)
    if found is not None:
        return found
    target = folder_to_write() / name
    lock = _acquire(target, waits=True)
    found = kept(name)  # made by another process meanwhile
    if found is not None:
        _release(lock)
        return found
    _compile(compiler, source, target, lock).finish()
    return target


def _compile(compiler: str, source: Path, target: Path, lock: IO[str] | None) -> _Compilation:
    try:
        return _Compilation([*shlex.split(compiler), *FLAGS, str(source)], target, lock)
    except OSError:
        _release(lock)
        raise


def _compiler(source: Path, needed: Sequence[str]) -> tuple[str, str]:
    """The compiler to use, and the library's name, which says all that it is made of."""
    features = processor()
    lacking = [name for name in needed if name not in features.split()]
    if lacking:
        raise OSError(f"the processor does not say that it has {', '.join(lacking)}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("there is no C++ compiler (g++ or clang++)")
    text = b"".join(path.read_bytes() for path in [source, *sorted(source.parent.glob("*.h"))])
    made_by = f"{features}{compiler}{FLAGS}{platform.libc_ver()}"
    key = hashlib.sha256(text + made_by.encode()).hexdigest()
    return compiler, f"{source.stem}-{key[:16]}.so"


def _acquire(target: Path, waits: bool) -> IO[str] | None:
    """The right to make a library: processes that start together make each once.

    Returns:
        To be released; ``None`` if another process has it.
    """
    kernel = target.name.rpartition("-")[0]
    lock = open(target.with_name(f".{kernel}.lock"), "a")  # noqa: SIM115 - held while the compiler works
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    except (ImportError, OSError):  # a system or a file system without locks: making it twice is harmless
        return lock
    return lock


def _release(lock: IO[str] | None) -> None:
    if lock is not None:
        lock.close()


def processor() -> str:
    """The processor's name and its instructions, as Linux tells them; empty elsewhere."""
    if not sys.platform.startswith("linux"):
        return ""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines}
    return f"{wanted.get('model name', '')} {wanted.get('flags', '')}"
