"""The product of rows and integer codes (``kernels/integer_product.cpp``), compiled once for a machine.

torch's own kernels for few bits read weights at a third to a half of what memory gives, keep one scale for
a whole tensor of activations, or know no groups: docs/quantization.md has the measurements. This one needs
a C++ compiler and a processor with AVX-512 VNNI; without them the layers compute the same over weights that
were made floating point again.
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
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "kernels" / "integer_product.cpp"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
NEEDED = "avx512_vnni"  # as Linux names it
COMPILING_SECONDS = 300
logger = logging.getLogger(__name__)

_LOCK = threading.Lock()
_LOADED: list[Any] = []  # the function, or None where it cannot be had


def loaded_kernel() -> Any:
    """The kernel if :func:`load_kernel` got it in this process, else ``None``."""
    return _LOADED[0] if _LOADED else None


def load_kernel() -> Any:
    """The kernel as a C function; compiled if this machine has not done so before (some seconds).

    Returns:
        ``None`` where there is no compiler or the processor lacks the instructions; the reason is logged.
    """
    with _LOCK:
        if not _LOADED:
            try:
                _LOADED.append(_function(_library()))
            except (OSError, subprocess.SubprocessError) as error:
                logger.info("products of integers are not compiled: %s", error)
                _LOADED.append(None)
        return _LOADED[0]


def _function(path: Path) -> Any:
    import torch  # noqa: F401 - its OpenMP threads, which the library then shares

    function = ctypes.CDLL(str(path)).mtnlg_integer_product
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer] * 3 + [integer] + [pointer] * 4 + [integer] * 6
    function.restype = None
    return function


def _library() -> Path:
    """The compiled file, from the cache or new.

    Raises:
        OSError: this machine cannot have it; the message says why.
        subprocess.SubprocessError: the compiler failed.
    """
    features = _processor()
    if NEEDED not in features.split():
        raise OSError(f"the processor does not say that it has {NEEDED}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler (g++ or clang++)")
    source = SOURCE.read_bytes()
    key = hashlib.sha256(source + f"{features}{compiler}{FLAGS}{platform.libc_ver()}".encode()).hexdigest()
    folder = cache_folder()
    target = folder / f"integer_product-{key[:16]}.so"
    if not target.is_file():
        _compile(compiler, folder, target)
    return target


def _compile(compiler: str, folder: Path, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", name, str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, timeout=COMPILING_SECONDS)
        os.replace(name, target)  # two processes may do this at once: each file is whole
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``mtnlg`` in the user's cache (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtnlg"


def _processor() -> str:
    """The processor's name and its instructions, as Linux tells them; empty elsewhere."""
    if not sys.platform.startswith("linux"):
        return ""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = {line.partition(":")[0].strip(): line.partition(":")[2] for line in lines}
    return f"{wanted.get('model name', '')} {wanted.get('flags', '')}"
