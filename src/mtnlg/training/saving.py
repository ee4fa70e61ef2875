"""Checkpoints that are written while training goes on.

A thread copies the state into memory of the CPU that is kept for it, while the next step's forward and
backward passes run: they change nothing of it. Only the update of the weights waits for the copy. The
thread then writes it, sending its messages through a process group of its own; one checkpoint is
written at a time. What it holds is one moment's state, whatever training does meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtnlg.config import CheckpointConfig
from mtnlg.parallel.mesh import Mesh
from mtnlg.training.checkpoint_files import prune
from mtnlg.training.checkpoints import TensorsByName, save_checkpoint
from mtnlg.training.optimizers import local

Parts = dict[str, TensorsByName]


class CheckpointSaver:
    """Saves one run's checkpoints on this rank; every rank calls the same methods in the same order.

    Args:
        run_dir: the run's folder.
        config: what is kept, and whether training waits for the disk.
        mesh: this rank's place.

    Attributes:
        waited_seconds: how long training stood still for the last :meth:`save`.
        written_seconds: how long the last checkpoint took from there to ``latest``.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig, mesh: Mesh) -> None:
        self.run_dir, self.config, self.mesh = run_dir, config, mesh
        self.waited_seconds = self.written_seconds = 0.0
        self._finished: list[tuple[Path, int]] = []
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, parts: Parts) -> None:
        """Make the memory for copies of ``parts`` in the background, so that no save waits for it."""
        if self.config.asynchronous and self._thread is None:
            sizes = {
                (part, name): local(tensor)
                for part, tensors in parts.items()
                for name, tensor in tensors.items()
            }
            self._start(partial(self._make_buffers, sizes))

    def save(self, step: int, parts: Parts, state: dict[str, Any], is_last: bool = False) -> None:
        """Save a checkpoint, or begin to.

        Args:
            step: steps done.
            parts: ``weights`` and ``optimizer``: this rank's tensors by name, free to change after
                :meth:`wait_for_copy`.
            state: what goes into ``state.json``.
            is_last: nothing is left to do meanwhile: write it here and now.

        Raises:
            TrainingError: this one, or the one begun before, could not be written.
        """
        begun = time.perf_counter()
        self.wait()
        write = partial(self._write, begun, step, deepcopy(state))
        if self.config.asynchronous and not is_last:
            group = None if self.mesh.device_mesh is None else _background_group(dist.group.WORLD)
            self._copied.clear()
            self._start(partial(self._copy_and_write, parts, self._now(), partial(write, group=group)))
        else:
            write(parts, group=None)
        self.waited_seconds = time.perf_counter() - begun

    def wait_for_copy(self) -> None:
        """Wait until what is being saved may change: before each update of the weights."""
        if not self._copied.is_set():
            begun = time.perf_counter()
            self._copied.wait()
            self.waited_seconds += time.perf_counter() - begun

    def wait(self) -> None:
        """Wait for what is being written.

        Raises:
            TrainingError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait_after(self, error: BaseException) -> None:
        """Let what is being written be finished although training failed with ``error``."""
        try:
            self.wait()
        except Exception as failure:
            error.add_note(f"And then: {failure}")

    @property
    def has_failed(self) -> bool:
        """Whether what was being written could not be: :meth:`wait` will raise."""
        return self._failure is not None

    def take_finished(self) -> list[tuple[Path, int]]:
        """Folders and steps of the checkpoints that are complete and were not taken yet."""
        finished, self._finished = self._finished, []
        return finished

    def _start(self, work: partial[None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised again by ``wait``, in the thread that trains
                self._failure = error

        # Not waited for when the process ends: a second Ctrl-C stops at once.
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _now(self) -> torch.cuda.Event | None:
        """When a GPU has done all that it was told to do so far."""
        if self.mesh.device.type != "cuda":
            return None
        return torch.cuda.current_stream(self.mesh.device).record_event()

    def _copy_and_write(
        self, parts: Parts, after: torch.cuda.Event | None, write: Callable[[Parts], None]
    ) -> None:
        try:
            if after is None:
                copies = self._copy(parts)
            else:
                stream = torch.cuda.Stream(self.mesh.device)
                stream.wait_event(after)
                with torch.cuda.stream(stream):
                    copies = self._copy(parts)
                stream.synchronize()
        finally:
            self._copied.set()
        write(copies)

    def _write(
        self, begun: float, step: int, state: dict[str, Any], parts: Parts, group: dist.ProcessGroup | None
    ) -> None:
        folder = save_checkpoint(self.run_dir, step, parts, state, self.mesh, group)
        if self.mesh.is_main:
            prune(self.run_dir, self.config.keep_last, self.config.keep_every)
        self.written_seconds = time.perf_counter() - begun
        self._finished.append((folder, step))

    def _make_buffers(self, like: dict[tuple[str, str], Tensor]) -> None:
        for key, tensor in like.items():
            self._buffer(key, tensor).zero_()  # the memory is there once it has been written to

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            pinned = like.device.type == "cuda"
            buffer = torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer

    @torch.no_grad()
    def _copy(self, parts: Parts) -> Parts:
        copies: Parts = {}
        for part, tensors in parts.items():
            copies[part] = {}
            for name, tensor in tensors.items():
                here = local(tensor)
                copy = self._buffer((part, name), here).copy_(here, non_blocking=True)
                if isinstance(tensor, DTensor):  # ``from_local`` would bring it back to the device
                    copy = DTensor(copy, tensor._spec, requires_grad=False)
                copies[part][name] = copy
        return copies


@cache
def _background_group(_world: dist.ProcessGroup) -> dist.ProcessGroup:
    """All ranks, on gloo: messages of another thread must not get between those of training."""
    return dist.new_group(backend="gloo")
