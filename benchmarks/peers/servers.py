"""Servers of GPT-2's shape, started as their makers say: ours, llama.cpp's, vLLM's, transformers'."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.gpt2_files import POSITIONS, write_gguf, write_hf

START_SECONDS = 300.0
SEQUENCES = 32  # that each may work on at a time


@dataclass
class Contender:
    """How a server is started.

    Args:
        command: of (folder of the model's files, dtype, port, threads).
        model: what requests call it.
        extra: fields of a request that let it write on past end tokens, where it knows one.
        program: what must be there.
        environment: variables that it is given.
    """

    command: Callable[[Path, str, int, int], list[str]]
    model: Callable[[Path], str]
    extra: dict[str, object]
    program: str
    environment: dict[str, str]


def _ours(folder: Path, dtype: str, port: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "mtnlg", "serve", str(write_hf(folder / "hf")), "--port", str(port)]
    return [*command, "--dtype", dtype, "--max-batch-size", str(SEQUENCES), "--model-name", "gpt2"]


def _llama(folder: Path, dtype: str, port: int, threads: int) -> list[str]:
    file = write_gguf(folder / f"gpt2-{dtype}.gguf", dtype, write_hf(folder / "hf"))
    command = [program("llama-server"), "-m", str(file), "--port", str(port), "-t", str(threads)]
    return [*command, "-np", str(SEQUENCES), "-c", str(SEQUENCES * POSITIONS), "--no-webui"]


def _vllm(folder: Path, dtype: str, port: int, threads: int) -> list[str]:
    name = {"bf16": "bfloat16"}.get(dtype, dtype)
    command = [program("vllm"), "serve", str(write_hf(folder / "hf")), "--port", str(port)]
    return [*command, "--dtype", name, "--max-model-len", str(POSITIONS), "--max-num-seqs", str(SEQUENCES)]


def _transformers(folder: Path, dtype: str, port: int, threads: int) -> list[str]:
    name = {"bf16": "bfloat16"}.get(dtype, dtype)
    command = [program("transformers"), "serve", str(write_hf(folder / "hf")), "--port", str(port)]
    return [*command, "--dtype", name, "--device", "cpu", "--continuous-batching"]


def _folder(folder: Path) -> str:
    return str(folder / "hf")


CONTENDERS = {
    "mtnlg": Contender(_ours, lambda _: "gpt2", {"ignore_eos": True}, "", {}),
    "llama.cpp": Contender(_llama, lambda _: "gpt2", {"ignore_eos": True}, "llama-server", {}),
    "vllm": Contender(
        _vllm,
        _folder,
        {"ignore_eos": True},
        "vllm",
        {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"},
    ),
    "transformers": Contender(_transformers, _folder, {}, "transformers", {}),
}


def program(name: str) -> str:
    """Where a program is: its variable (``LLAMA_SERVER``, ``VLLM``, ...), beside Python, or the PATH.

    Raises:
        FileNotFoundError: nowhere.
    """
    stated = os.environ.get(name.upper().replace("-", "_"))
    beside = str(Path(sys.executable).parent / name)
    found = next((path for path in (stated, beside, name) if path and shutil.which(path)), None)
    if found is None:
        raise FileNotFoundError(f"{name} is not here: set {name.upper().replace('-', '_')} to its path")
    return found


class ServerProcess:
    """A running server; it sleeps while others are measured."""

    def __init__(self, name: str, folder: Path, dtype: str, threads: int) -> None:
        contender = CONTENDERS[name]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name, self.model, self.extra = name, contender.model(folder), contender.extra
        command = contender.command(folder, dtype, self.port, threads)
        environment = {**os.environ, **contender.environment, "OMP_NUM_THREADS": str(threads)}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.log = folder / f"{name}-{dtype}.log"
        began = time.perf_counter()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
        self._wait_until_it_answers()
        self.ready_seconds = time.perf_counter() - began

    def wake(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def sleep(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.wake()
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait_until_it_answers(self) -> None:
        """Until a completion of one token is answered."""
        body = f'{{"model": "{self.model}", "prompt": " abc abd", "max_tokens": 1, "temperature": 0}}'
        ends = time.perf_counter() + START_SECONDS
        while time.perf_counter() < ends:
            if self.process.poll() is not None:
                break
            request = urllib.request.Request(
                f"http://127.0.0.1:{self.port}/v1/completions",
                body.encode(),
                {"Content-Type": "application/json"},
            )
            with suppress(OSError), urllib.request.urlopen(request, timeout=60):
                return
            time.sleep(0.05)
        self.end()
        tail = self.log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{self.name} did not start:\n{tail}")
