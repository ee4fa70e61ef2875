"""Generation over several ranks: rank 0 runs the engine, the others follow it step by step.

Rank 0 tells the others what to do in one message, small integers only: the new tokens of each row,
where they go on from, and the numbers of their pages. Books are kept on rank 0 alone. While there is
nothing to do it says so from time to time, so that nobody waits without end for a rank that is gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.config.errors import ConfigError, MtnlgError, RankError
from mtnlg.config.generation import COMPILE_MODES, GIB, EngineConfig
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.memory import SHARE_OF_DEVICE, device_memory
from mtnlg.generation.pair_stage_runner import PairStageRunner
from mtnlg.generation.prepared_stage import PreparedStage
from mtnlg.generation.rank_adapters import pack_adapter, unpack_adapter
from mtnlg.generation.rank_messages import Command, Commands, pack_rows, unpack_rows
from mtnlg.generation.runner import PAGE_SIZE, Row, with_own
from mtnlg.generation.stage_runner import StageRunner
from mtnlg.interop.adapter import Adapter
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder
from mtnlg.parallel.companions import is_of_connection
from mtnlg.parallel.inference import ReadWeights, lay_out_for_inference, local_heads
from mtnlg.parallel.mesh import Mesh

TIMEOUT_SECONDS = 300.0  # after which a rank that does not answer is given up
NOTES_PER_TIMEOUT = 4  # how often rank 0 says that there is nothing to do
# Compiling takes a core for some seconds; a smaller model has answered by then.
WORTH_COMPILING = 5_000_000  # parameters
DTYPES = {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Share:
    """What a rank has of a model: how to get its weights, and its stage once it has them.

    Args:
        config: the architecture.
        mesh: this rank's place.
        read: gives the weights.
    """

    config: MegatronModelConfig
    mesh: Mesh
    read: ReadWeights
    _stage: PreparedStage | MegatronEncoderDecoder | None = None
    _made_for: tuple[str, bool] | None = None

    @torch.inference_mode()
    def set_up(self, engine: EngineConfig) -> StageRunner | PairStageRunner:
        """Load the weights, unless they are there, and make pages; every rank calls this."""
        made_for = (engine.dtype, engine.deterministic)
        if self._stage is None or self._made_for != made_for:
            self._stage = None  # before the next comes into memory
            decoder = lay_out_for_inference(self.config, self.mesh, self.read, DTYPES[engine.dtype])
            self._stage = (
                decoder
                if isinstance(decoder, MegatronEncoderDecoder)
                else PreparedStage(decoder, self.mesh, engine.deterministic)
            )
            self._made_for = made_for
        if isinstance(self._stage, MegatronEncoderDecoder):
            return self._set_up_pair(self._stage, engine)
        kept = len(self._stage.layers) * self._stage.num_heads * self._stage.dtype.itemsize
        num_pages = self._agreed_pages(kept, engine)
        mode = engine.compile
        if mode == "auto" and self.config.num_parameters < WORTH_COMPILING:
            mode = "off"
        deterministic = engine.deterministic
        return StageRunner(self._stage, self.mesh, num_pages, PAGE_SIZE, deterministic, mode, self.read)

    def _set_up_pair(self, stage: MegatronEncoderDecoder, engine: EngineConfig) -> PairStageRunner:
        heads, size = local_heads(cast(MegatronLmDecoder, stage)), next(stage.parameters()).itemsize
        num_layers = sum(int(index) >= self.config.num_hidden_layers for index in stage.layers)
        num_pages = self._agreed_pages(num_layers * heads * size, engine)
        return PairStageRunner(stage, self.mesh, num_pages, PAGE_SIZE, engine.deterministic, heads)

    def _agreed_pages(self, kept: int, engine: EngineConfig) -> int:
        """Pages that fit into every rank's memory; ``cache_gib`` counts for each rank.

        ``kept`` are bytes of a token's keys in one dimension, in all heads and layers of this rank.
        """
        token_bytes = 2 * kept * self.config.head_size
        page_bytes = max(1, token_bytes * PAGE_SIZE)
        if engine.cache_gib:
            pages = int(engine.cache_gib * GIB) // page_bytes
        else:
            device = self.mesh.device
            here = int(os.environ.get("LOCAL_WORLD_SIZE", self.mesh.num_ranks))
            memory = device_memory(device) // (here if device.type == "cpu" else 1)
            per_request = -(-self.config.max_position_embeddings // PAGE_SIZE)
            pages = min(per_request * engine.max_batch_size, int(memory * SHARE_OF_DEVICE) // page_bytes)
        fewest = torch.tensor(pages, device=self.mesh.device)
        if self.mesh.num_ranks > 1:
            dist.all_reduce(fewest, dist.ReduceOp.MIN)
        if fewest < 1:
            raise ConfigError(
                f"cache_gib is {engine.cache_gib}: one page of {PAGE_SIZE} tokens takes "
                f"{page_bytes / GIB:.3g} GiB on one of the ranks."
            )
        return int(fewest)


class RankRunner:
    """Rank 0's :class:`~mtnlg.generation.runner.Runner`: does its own share and leads the others.

    Args:
        share: rank 0's.
        engine: settings; page numbers, precision and determinism of all ranks follow them.
        what_happened: says which rank has ended and why; ``None`` while all live.
        timeout_seconds: of the process group, after which a rank is given up.
        group: all ranks, on the CPU.
        own: the adapter of rows that name none.

    Raises:
        RankError: a rank could not load its share.
    """

    takes_adapters = True

    def __init__(
        self,
        share: Share,
        engine: EngineConfig,
        what_happened: Callable[[], str | None] = lambda: None,
        timeout_seconds: float = TIMEOUT_SECONDS,
        group: dist.ProcessGroup | None = None,
        own: Adapter | None = None,
    ) -> None:
        self._own = None if own is None else LoadedAdapter("", 0, own)
        self._known: set[int] = set()  # serials of the adapters that all ranks have
        self._forgotten: deque[int] = deque()  # of those that nobody uses any more
        self._commands, self._what_happened = Commands(group), what_happened
        self._timeout = timeout_seconds
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.failure: BaseException | None = None
        with self._leading(Command.SET_UP, _pack_engine(engine)):
            self._stage = share.set_up(engine)
        self.is_invariant = engine.deterministic
        self.num_pages, self.page_size = self._stage.num_pages, self._stage.page_size
        self.vocab_size, self.max_length = share.config.vocab_size, share.config.max_cached_length
        self.reads_source, self.start_id = share.config.has_encoder, share.config.decoder_start_token_id
        if self.reads_source:
            self.max_length, self.takes_adapters = share.config.max_position_embeddings, False
        threading.Thread(target=self._say_that_we_live, daemon=True).start()

    def run(self, rows: Sequence[Row]) -> Tensor:
        """See :class:`~mtnlg.generation.runner.Runner`.

        Raises:
            RankError: a rank has ended or does not answer; nothing can be computed any more.
        """
        rows = self._with_adapters(rows)
        with self._leading(Command.RUN, pack_rows(rows)):
            logits = self._stage.run(rows)
        assert logits is not None
        return logits

    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """See :class:`~mtnlg.generation.runner.Runner`; raises as :meth:`run`."""
        rows = self._with_adapters(rows)
        with self._leading(Command.HIDDEN, pack_rows(rows)):
            states = self._stage.hidden(rows)
        assert states is not None
        return states

    def _with_adapters(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows, whose adapters all ranks have."""
        rows = with_own(rows, self._own)
        for loaded in {row.adapter: None for row in rows}:
            if loaded is None or loaded.serial in self._known:
                continue
            numbers, content = pack_adapter(loaded)
            with self._leading(Command.ADAPTER, numbers):
                self._commands.send_bytes(content)
            self._known.add(loaded.serial)
            weakref.finalize(loaded, self._forgotten.append, loaded.serial)
        if self._forgotten:
            gone = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
            with self._leading(Command.FORGET, gone):
                self._known.difference_update(gone)
        return rows

    def copy_pages(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See :class:`~mtnlg.generation.runner.Runner`; raises as :meth:`run`."""
        with self._leading(Command.COPY_PAGES, [*sources, *targets]):
            self._stage.copy_pages(sources, targets)

    def close(self, ends_ranks: bool = True) -> None:
        """Let the other ranks end; without ``ends_ranks`` they wait for another runner's set-up."""
        if self._closed.is_set():
            return
        if ends_ranks and self.failure is None:
            with self._leading(Command.END):
                pass
        self._closed.set()

    @contextmanager
    def _leading(self, command: Command, numbers: Sequence[int] = ()) -> Iterator[None]:
        """Tell the others, do our share inside; whatever fails ends the model."""
        if self.failure is not None:
            raise RankError(f"the model is gone: {self.failure}")
        with self._lock, _uninterrupted():
            try:
                self._commands.send(command, numbers)
                yield
            except Exception as error:
                self.failure = self._explain(error)
                self._closed.set()
                raise self.failure from error

    def _explain(self, error: Exception) -> Exception:
        """What is behind an error: a rank that has ended is seen by us as a broken connection."""
        deadline = time.monotonic() + 3.0
        while (reason := self._what_happened()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if reason is not None:
            return RankError(reason)
        if isinstance(error, MtnlgError) or not is_of_connection(error):
            return error
        return RankError(
            f"another rank has ended, or has not answered for {self._timeout:.0f} s: "
            f"{str(error).splitlines()[0]}"
        )

    def _say_that_we_live(self) -> None:
        while not self._closed.wait(self._timeout / NOTES_PER_TIMEOUT):
            # Where the lock is held, a step's own messages say the same.
            if self._lock.acquire(blocking=False):
                try:
                    self._commands.send(Command.WAIT)
                except Exception as error:
                    self.failure = self._explain(error)
                    return
                finally:
                    self._lock.release()


def follow(share: Share, group: dist.ProcessGroup | None = None) -> None:
    """What every rank but the first does: its share of each step, until rank 0 says that it is over.

    Args:
        share: this rank's.
        group: all ranks, on the CPU.

    Raises:
        RankError: another rank has ended or does not answer.
    """
    try:
        _follow(share, Commands(group))
    except RuntimeError as error:
        if isinstance(error, MtnlgError) or not is_of_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise RankError(f"another rank of the model has ended or does not answer: {reason}") from error


def _follow(share: Share, commands: Commands) -> None:
    stage: StageRunner | PairStageRunner | None = None
    adapters: dict[int, LoadedAdapter] = {}
    while True:
        command, numbers = commands.receive()
        if command == Command.END:
            return
        if command == Command.SET_UP:
            adapters.clear()
            stage = share.set_up(_unpack_engine(numbers))
        elif command == Command.ADAPTER:
            adapters[numbers[0]] = unpack_adapter(numbers, commands.receive_bytes(numbers[1]))
        elif command == Command.FORGET:
            for serial in numbers:
                del adapters[serial]
        elif command != Command.WAIT:
            if stage is None:
                raise AssertionError(f"{command.name} before {Command.SET_UP.name}")
            _do(stage, command, numbers, adapters)


def _do(
    stage: StageRunner | PairStageRunner,
    command: Command,
    numbers: list[int],
    adapters: Mapping[int, LoadedAdapter],
) -> None:
    if command == Command.COPY_PAGES:
        half = len(numbers) // 2
        stage.copy_pages(numbers[:half], numbers[half:])
    elif command == Command.RUN:
        stage.run(unpack_rows(numbers, adapters))
    else:
        stage.hidden(unpack_rows(numbers, adapters))


def _pack_engine(engine: EngineConfig) -> list[int]:
    kib = int(engine.cache_gib * 2**20)
    choices = [list(DTYPES).index(engine.dtype), COMPILE_MODES.index(engine.compile)]
    return [engine.max_batch_size, kib, *choices, int(engine.deterministic)]


def _unpack_engine(numbers: Sequence[int]) -> EngineConfig:
    batch, kib, dtype, mode, deterministic = numbers
    return EngineConfig(
        max_batch_size=batch,
        cache_gib=kib / 2**20,
        dtype=list(DTYPES)[dtype],
        compile=COMPILE_MODES[mode],
        deterministic=bool(deterministic),
    )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """While inside, Ctrl-C and SIGTERM wait: a step left in the middle would leave the ranks apart."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals on the main thread
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in received:
        signal.raise_signal(late)
