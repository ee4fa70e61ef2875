"""C++ kernels in ``kernels/``, each compiled once for a machine and kept in the user's cache.

A kernel is there for speed: without a compiler, or on another processor, whoever asks for it computes the
same by other means.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtnlg.native import NoCompilerError, NoFolderError, library

FOLDER = Path(__file__).parent / "kernels"
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
                    _explain(self.file, error)
                    self._loaded.append(None)
            return self._loaded[0]

    def _open(self) -> Any:
        import torch  # noqa: F401 - its OpenMP threads, which the library then shares

        path = library(FOLDER / self.file, self.needed)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # cut short when the machine went down, or removed a moment ago
            path.unlink(missing_ok=True)
            loaded = ctypes.CDLL(str(library(FOLDER / self.file, self.needed)))
        function = getattr(loaded, self.function)
        function.argtypes, function.restype = list(self.arguments), None
        return function


_explained: set[type] = set()


def _explain(file: str, error: Exception) -> None:
    """Log why there is no kernel; once for all of them where somebody can do something about it."""
    can_be_cured = isinstance(error, (NoCompilerError, NoFolderError, subprocess.SubprocessError))
    if not can_be_cured or type(error) in _explained:
        logger.info("%s is not compiled: %s", file, error)
        return
    _explained.add(type(error))
    logger.warning(
        "fast kernels for CPUs are left out, and answers take longer: %s (--compile off: do without).",
        error,
    )
