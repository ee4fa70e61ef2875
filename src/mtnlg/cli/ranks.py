"""A model that is divided over ranks, as ``generate``, ``chat`` and ``serve`` open it.

This process is rank 0. It starts the others on this machine, or finds them where ``torchrun`` (or
SLURM) has started every rank with the same command line.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch.distributed as dist
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.api import MegatronLmModel
    from mtnlg.config.generation import EngineConfig
    from mtnlg.generation.ranks import RankRunner, Share
    from mtnlg.interop.adapter import Adapter
    from mtnlg.parallel.companions import Companions
    from mtnlg.training.model_files import ModelFiles

GRACE_SECONDS = 10.0  # for this process to end by itself when another rank has


def add_rank_arguments(parser: ArgumentParser) -> None:
    """Declare over how many ranks the model is divided."""
    for name, what in (
        ("tensor", "ranks that share each layer's matrices; null is 1, or all that torchrun started"),
        ("pipeline", "ranks that the layers are divided over; null is 1"),
    ):
        parser.add_argument(f"--{name}-parallel-size", type=int | None, default=None, help=what)


def wants_ranks(arguments: Namespace) -> bool:
    """Whether these arguments, or a launcher, ask for more than one rank."""
    sizes = (arguments.tensor_parallel_size, arguments.pipeline_parallel_size)
    is_asked = any(size not in (None, 1) for size in sizes)
    if not is_asked and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        return False  # without importing what divides models, which takes a second
    from mtnlg.parallel.launch import join_slurm
    from mtnlg.parallel.mesh import ranks_present

    join_slurm()
    return is_asked or (ranks_present() or 1) > 1


def open_over_ranks(
    name_or_path: str,
    device_type: str,
    tensor: int | None = None,
    pipeline: int | None = None,
    adapter: str | None = None,
) -> MegatronLmModel:
    """The model with its tokenizer; its weights are with the ranks, and engines run it through them.

    On ranks other than the first, where a launcher started them, this follows rank 0 and ends the
    process when it is over.

    Args:
        name_or_path: MODEL.
        device_type: ``cpu`` or ``cuda``.
        tensor: ranks that share each layer's matrices; ``None`` is as many as there are.
        pipeline: ranks that the layers are divided over; ``None`` is 1.
        adapter: an adapter's folder; LoRA is merged as weights are read, virtual tokens go with every row.

    Raises:
        CheckpointError: nothing loadable is there.
        ConfigError: the model cannot be divided so, or the ranks or devices are not there.
        RankError: a rank did not start.
    """
    import torch

    from mtnlg.api import MegatronLmModel
    from mtnlg.encoder_decoder import MegatronEncoderDecoderModel
    from mtnlg.generation.ranks import TIMEOUT_SECONDS, follow
    from mtnlg.parallel.mesh import ranks_present
    from mtnlg.training.adapter_files import base_fingerprint

    files, own = open_with_adapter(name_or_path, adapter)
    present = ranks_present()
    pipeline = pipeline or 1
    tensor = tensor or max(1, (present or 1) // pipeline)
    _check(files, own, tensor, pipeline, device_type)
    companions = None
    if present is None:
        companions = _start(name_or_path, tensor, pipeline, device_type, TIMEOUT_SECONDS, adapter)
    share = join_layout(files, tensor, pipeline, device_type)
    group = control_group(device_type)
    if share.mesh.rank > 0:
        follow(share, group)
        raise SystemExit(0)
    with torch.device("meta"):
        if files.config.has_encoder:
            model = cast(MegatronLmModel, MegatronEncoderDecoderModel(files.config, files.tokenizer))
        else:
            model = MegatronLmModel(files.config, files.tokenizer)
    model.make_runner = _Leader(share, group, companions, own).make_runner
    model.read_fingerprint = partial(base_fingerprint, files.base or files)
    model.adapter = None if own is None else own.config
    return model.eval()


def open_with_adapter(name_or_path: str, adapter: str | None) -> tuple[ModelFiles, Adapter | None]:
    """The files whose weights ranks read, and an adapter that cannot be merged into them.

    Raises:
        CheckpointError: nothing loadable is there, or the adapter was made for another model.
    """
    from mtnlg.config.prompt_tuning import prompt_adapter
    from mtnlg.interop.adapter import adapter_from_values
    from mtnlg.interop.fingerprint import check_base
    from mtnlg.model.adapters import PROMPT_NAME
    from mtnlg.training.adapter_files import base_fingerprint, with_adapter
    from mtnlg.training.model_files import open_model_files

    files = open_model_files(name_or_path)
    prompt = prompt_adapter(files.config)
    if prompt is not None and adapter is None and files.adapter is None:
        return files, adapter_from_values(prompt, dict(files.stream(frozenset([PROMPT_NAME]))))
    if adapter is not None:
        files = with_adapter(files, Path(adapter))
    if files.adapter is None or files.base is None or not files.adapter.config.num_positions:
        return files, None
    if files.adapter.base_fingerprint is not None:
        check_base(files.adapter.base_fingerprint, base_fingerprint(files.base), adapter or name_or_path)
    return replace(files.base, tokenizer=files.tokenizer), files.adapter


def join_layout(files: ModelFiles, tensor: int, pipeline: int, device_type: str) -> Share:
    """This rank's place and what it needs to hold its share; every rank calls this."""
    from mtnlg.generation.ranks import TIMEOUT_SECONDS, Share
    from mtnlg.parallel.inference import inference_layout
    from mtnlg.parallel.mesh import build_mesh

    mesh = build_mesh(inference_layout(tensor, pipeline), device_type, TIMEOUT_SECONDS)
    return Share(files.config, mesh, files.stream)


def backend_of(device_type: str) -> str:
    """What ranks on such devices send tensors with."""
    return "nccl" if device_type == "cuda" else "gloo"


def control_group(device_type: str) -> dist.ProcessGroup | None:
    """All ranks, on the CPU: for what rank 0 tells the others; every rank calls this."""
    import torch.distributed as dist

    return None if device_type == "cpu" else dist.new_group(backend="gloo")


def _check(files: ModelFiles, own: Adapter | None, tensor: int, pipeline: int, device_type: str) -> None:
    """Whatever can be known to be wrong before a process starts."""
    import torch

    from mtnlg.config import ConfigError
    from mtnlg.parallel.inference import inference_layout, inference_problems
    from mtnlg.parallel.mesh import ranks_present

    problems = inference_problems(inference_layout(tensor, pipeline), files.config)
    if own is not None and files.config.has_encoder:
        problems.append("an encoder-decoder with virtual tokens generates on one rank only.")
    size, present = tensor * pipeline, ranks_present()
    asked = f"tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline} are {size} ranks"
    if present is not None and present != size:
        problems.append(f"{asked}, and the launcher started {present}.")
    if present is None and device_type == "cuda" and size > torch.cuda.device_count():
        problems.append(f"{asked}, and this machine has {torch.cuda.device_count()} GPUs.")
    if problems:
        raise ConfigError(problems)


def _start(
    name_or_path: str,
    tensor: int,
    pipeline: int,
    device_type: str,
    timeout_seconds: float,
    adapter: str | None,
) -> Companions:
    """Start the other ranks and wait until they are there."""
    import torch

    from mtnlg.parallel.companions import Companions
    from mtnlg.training.meter import available_cores

    size = tensor * pipeline
    num_threads = max(1, available_cores() // size)
    torch.set_num_threads(num_threads)
    settings: dict[str, Any] = {"model": str(name_or_path), "adapter": adapter, "device": device_type}
    settings |= {"tensor": tensor, "pipeline": pipeline}
    command = [sys.executable, "-m", "mtnlg.cli.rank_process"]
    companions = Companions(command, size, settings, num_threads, timeout_seconds)
    companions.join(backend_of(device_type))
    return companions


@dataclass
class _Leader:
    """Rank 0: makes the runner that leads the others, and ends with them.

    Args:
        share: rank 0's.
        group: all ranks, on the CPU.
        companions: the other processes; ``None`` where a launcher started and watches them.
        own: the adapter of every row that names none.
    """

    share: Share
    group: dist.ProcessGroup | None
    companions: Companions | None
    own: Adapter | None = None
    _runner: RankRunner | None = None
    _is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        atexit.register(self._end)
        if self.companions is not None:
            threading.Thread(target=self._watch, daemon=True).start()

    def make_runner(self, engine: EngineConfig) -> RankRunner:
        """A runner for an engine; it takes the place of the one before."""
        from mtnlg.generation.ranks import TIMEOUT_SECONDS, RankRunner

        if self._runner is not None:
            self._runner.close(ends_ranks=False)
        happened: Any = self.companions.what_happened if self.companions else lambda: None
        self._runner = RankRunner(self.share, engine, happened, TIMEOUT_SECONDS, self.group, self.own)
        return self._runner

    def _watch(self) -> None:
        """End this process soon after another rank has ended, also where nobody is computing."""
        from mtnlg.cli.main import EXIT_ERROR

        assert self.companions is not None
        while (reason := self.companions.what_happened()) is None:
            if self._is_over.wait(0.5):
                return
        if self._is_over.wait(1.0):  # a step has failed of it, and says so
            return
        print(f"mtnlg: {reason}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)  # so that terminals and sockets are left in order
        if not self._is_over.wait(GRACE_SECONDS):
            os._exit(EXIT_ERROR)

    def _end(self) -> None:
        """At the end of this process: let the others end."""
        from mtnlg.cli.main import EXIT_ERROR
        from mtnlg.config.errors import RankError

        self._is_over.set()
        reason = None if self.companions is None else self.companions.what_happened()
        if self._runner is not None and reason is None:
            try:
                self._runner.close()
            except RankError as error:
                reason = str(error)
        if self.companions is not None:
            self.companions.end(seconds=0.0 if reason else 5.0)
        if reason is not None:  # whatever the exit code would have been
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(EXIT_ERROR)
