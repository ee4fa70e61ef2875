"""Which form of paged attention runs: on a CPU a kernel of our own, elsewhere what ``torch.compile`` makes,
or the plain form where there is neither."""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtnlg.config.errors import ConfigError
from mtnlg.generation.compiling import compiled
from mtnlg.generation.native_attention import NativeAttention, native_attention
from mtnlg.generation.paged_attention import PagePool, attend_pages, attend_step

Kernel = Callable[..., Tensor]
CALLS_BEFORE_COMPILING = 1000  # of one layer in one step
# Where a compiler beside running steps would take the cores that they need, for many seconds.
NEVER_BESIDE_STEPS = ("cpu",)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelShape:
    """What a compiled kernel is made for; tokens, pages and lengths may be any.

    Args:
        heads: of keys and values.
        queries: heads of queries for each.
        head_size: dimensions.
        page_size: tokens.
        dtype: of the model and its cache.
        device: type of the device.
    """

    heads: int
    queries: int
    head_size: int
    page_size: int
    dtype: torch.dtype
    device: str


class AttentionKernel:
    """Attention of single tokens: :func:`attend_pages`, compiled, or what stands in for it.

    Args:
        shape: of the model.
        mode: ``off`` is the plain form. ``on`` and ``auto`` take our own kernel, which is there from the
            first step. Where there is none, ``on`` compiles before the first step, and ``auto`` on a GPU
            in the background, once there has been some work: a short program should not wait for a
            compiler at its end.
        is_invariant: a token's numbers may never depend on other tokens, nor change when the compiler
            is done: ``auto`` then compiles before the first step too, on a GPU.

    Attributes:
        step: :func:`attend_step`, as soon as there is a kernel for it.

    Raises:
        ConfigError: ``mode`` is ``on`` and there is no compiler that works.
    """

    def __init__(
        self,
        shape: KernelShape,
        mode: str,
        is_invariant: bool,
    ) -> None:
        self.shape, self.is_invariant = shape, is_invariant
        self._kernel: Kernel | None = None
        self.step: Kernel | None = None
        self._calls_left = -1
        native = None if mode == "off" else native_attention(shape)
        if native is not None:
            self._kernel, self.step = native.attend, native.step
        elif mode == "on":
            self._compile(is_wanted=True)
        elif mode == "auto" and shape.device not in NEVER_BESIDE_STEPS:
            self._compile_in_time()

    def _compile_in_time(self) -> None:
        if self.is_invariant:
            self._compile()
        else:
            self._calls_left = CALLS_BEFORE_COMPILING

    @property
    def is_native(self) -> bool:
        """Whether it is the kernel of our own."""
        return self.step is not None and isinstance(getattr(self.step, "__self__", None), NativeAttention)

    @property
    def is_compiled(self) -> bool:
        """Whether a compiled kernel is in use."""
        return self._kernel is not None

    def __call__(self, query: Tensor, pool: PagePool, pages: Tensor, lengths: Tensor) -> Tensor:
        """See :func:`attend_pages`."""
        if self._kernel is not None:
            return self._kernel(query, pool.keys, pool.values, pages, lengths)
        self._calls_left -= 1
        if self._calls_left == 0:
            self.compile_in_background()
        if self.is_invariant:
            return attend_in_order(query, pool, pages, lengths)
        return attend_gathered(query, pool, pages, lengths)

    def compile_in_background(self) -> threading.Thread:
        """Steps go on as they are until it is done; the program's end waits for it."""
        thread = threading.Thread(target=self._compile, name="mtnlg-compile", daemon=True)
        thread.start()
        # A thread that is inside the compiler when the interpreter goes away takes the program down.
        atexit.register(thread.join)
        return thread

    def _compile(self, is_wanted: bool = False) -> None:
        try:
            if not self.is_invariant:
                self.step = compiled_kernel(attend_step, self.shape)
            self._kernel = compiled_kernel(attend_pages, self.shape)
        except Exception as error:  # whatever the compiler lacks: the plain form gives the same
            if is_wanted and lacks_compiler(error):
                raise ConfigError(
                    "compile is on, and torch.compile finds no compiler that works here: "
                    f"{str(error).splitlines()[0]}. Install one (g++ for a CPU, Triton for a GPU), or "
                    "leave it at auto or off."
                ) from error
            if is_wanted:
                raise
            logger.info("attention is not compiled: %s", error)


def lacks_compiler(error: BaseException | None) -> bool:
    """Whether this comes of a compiler that is missing or does not work, not of what it was given."""
    from torch._inductor import exc

    kinds = (exc.InvalidCxxCompiler, exc.CppCompileError, exc.TritonMissing, exc.GPUTooOldForTriton)
    while error is not None:
        if isinstance(error, kinds):
            return True
        error = error.__cause__ or error.__context__
    return False


_KERNELS: dict[tuple[str, KernelShape], Kernel] = {}
_LOCK = threading.Lock()


def compiled_kernel(function: Kernel, shape: KernelShape) -> Kernel:
    """``function`` compiled for ``shape``, once in a process; takes seconds the first time.

    Raises:
        Exception: whatever the compiler finds missing, first of all a C++ compiler.
    """
    key = (function.__name__, shape)
    with _LOCK:
        if key not in _KERNELS:
            _KERNELS[key] = _compiled(function, shape)
        return _KERNELS[key]


@torch.inference_mode()
def _compiled(function: Kernel, shape: KernelShape) -> Kernel:
    tokens, pages, pool_pages, filled = 3, 5, 7, 11  # all different: equal sizes are held for the same one
    device = torch.device(shape.device)
    pool = PagePool(pool_pages, shape.page_size, shape.heads, shape.head_size, shape.dtype, device)
    table = torch.zeros(tokens, pages, dtype=torch.int64, device=device)
    lengths = torch.ones(tokens, dtype=torch.int64, device=device)
    held, of_tokens = [(0,), (0,)], [(0, 1), (0,)]
    if function is attend_pages:
        query = pool.keys.new_zeros(tokens, shape.heads, shape.queries, shape.head_size)
        return compiled(
            function, [query, pool.keys, pool.values, table, lengths], [(0,), *held, *of_tokens]
        )
    projected = pool.keys.new_zeros(filled, shape.heads * (shape.queries + 2) * shape.head_size)
    new_pages, new_places = torch.zeros(2, tokens, dtype=torch.int64, device=device).unbind()
    return compiled(
        function,
        [projected, pool.keys, pool.values, new_pages, new_places, table, lengths],
        [(0,), *held, (0,), (0,), *of_tokens],
    )


def attend_gathered(query: Tensor, pool: PagePool, pages: Tensor, lengths: Tensor) -> Tensor:
    """The same through torch's own kernel, over copies of the pages."""
    keys = pool.keys[pages].permute(0, 2, 1, 4, 3).flatten(2, 3)  # [tokens, heads, keys, head_dim]
    values = pool.values[pages].permute(0, 2, 1, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    if query.device.type == "cpu":  # whose kernel takes three times as long for one query in bf16
        query, keys, values = query.float(), keys.float(), values.float()
    is_seen = torch.arange(keys.shape[2], device=query.device) < lengths[:, None]
    found = F.scaled_dot_product_attention(query, keys, values, attn_mask=is_seen[:, None, None])
    return found.to(pool.keys.dtype)


def attend_in_order(query: Tensor, pool: PagePool, pages: Tensor, lengths: Tensor) -> Tensor:
    """The same, each token by itself and page after page: slow, and blind to its neighbours."""
    done = []
    for token, table, length in zip(query, pages, lengths.tolist()):
        keys, values = pool.read(table[: -(-length // pool.page_size)], length)
        scores = (token.float()[:, :, None] * keys.float()[:, None]).sum(-1) * token.shape[-1] ** -0.5
        weights = scores.softmax(dim=-1)  # [heads, queries, keys]
        done.append((weights[..., None] * values.float()[:, None]).sum(2))
    return torch.stack(done).to(query.dtype)
