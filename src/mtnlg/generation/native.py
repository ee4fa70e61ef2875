"""C++ kernels in ``kernels/``, each compiled once for a machine and kept in the user's cache.

A kernel is there for speed: without a compiler, or on another processor, whoever asks for it computes the
same by other means.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "kernels"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi"]
COMPILING_SECONDS = 300
logger = logging.getLogger(__name__)


class NativeKernel:
    """One C function.

    Args:
        file: its source in ``kernels/``.
        function: its name.
        arguments: their types.
        needed: instructions that the processor must have, as Linux names them.
    """

    def __init__(self, file: str, function: str, arguments: Sequence[Any], needed: Sequence[str]) -> None:
        self.file, self.function, self.arguments, self.needed = file, function, arguments, needed
        self._lock = threading.Lock()
        self._loaded: list[Any] = []  # the function, or None where it cannot be had

    @property
    def loaded(self) -> Any:
        """The function if :meth:`load` got it in this process, else ``None``."""
        return self._loaded[0] if self._loaded else None

    def load(self) -> Any:
        """The function; compiled if this machine has not done so before (some seconds).

        Returns:
            ``None`` where there is no compiler or the processor lacks the instructions; the reason is
            logged.
        """
        with self._lock:
            if not self._loaded:
                try:
                    self._loaded.append(self._open())
                except (OSError, subprocess.SubprocessError) as error:
                    logger.info("%s is not compiled: %s", self.file, error)
                    self._loaded.append(None)
            return self._loaded[0]

    def _open(self) -> Any:
        import torch  # noqa: F401 - its OpenMP threads, which the library then shares

        function = getattr(ctypes.CDLL(str(self._library())), self.function)
        function.argtypes, function.restype = list(self.arguments), None
        return function

    def _library(self) -> Path:
        """The compiled file, from the cache or new.

        Raises:
            OSError: this machine cannot have it; the message says why.
            subprocess.SubprocessError: the compiler failed.
        """
        features = processor()
        lacking = [name for name in self.needed if name not in features.split()]
        if lacking:
            raise OSError(f"the processor does not say that it has {', '.join(lacking)}")
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise OSError("there is no C++ compiler (g++ or clang++)")
        source = b"".join(path.read_bytes() for path in [FOLDER / self.file, *sorted(FOLDER.glob("*.h"))])
        made_by = f"{features}{compiler}{FLAGS}{platform.libc_ver()}"
        key = hashlib.sha256(source + made_by.encode()).hexdigest()
        target = cache_folder() / f"{Path(self.file).stem}-{key[:16]}.so"
        if not target.is_file():
            _compile(compiler, FOLDER / self.file, target)
        return target


def _compile(compiler: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", name, str(source)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILING_SECONDS)
        os.replace(name, target)  # two processes may do this at once: each file is whole
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``mtnlg`` in the user's cache (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtnlg"


def processor() -> str:
    """The processor's name and its instructions, as Linux tells them; empty elsewhere."""
    if not sys.platform.startswith("linux"):
        return ""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines}
    return f"{wanted.get('model name', '')} {wanted.get('flags', '')}"
