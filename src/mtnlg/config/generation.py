"""How the generation engine works: batch, memory, precision, determinism, queue."""

from __future__ import annotations

from dataclasses import dataclass

from mtnlg.config.errors import ConfigError

DTYPES = ("auto", "float32", "bf16")
CACHE_DTYPES = ("auto", "int8")
COMPILE_MODES = ("auto", "on", "off")
SPECULATIONS = ("none", "ngram", "draft")
GIB = 2**30


@dataclass(frozen=True)
class EngineConfig:
    """Settings of the generation engine, the same for Python, the terminal and the server.

    Args:
        max_batch_size: requests that generate at the same time; more wait in the queue.
        max_queue_size: requests that may wait; a further one is refused.
        cache_gib: memory for keys and values in GiB; 0 takes what ``max_batch_size`` requests of the
            model's full length need, at most a quarter of the device's memory.
        prefill_chunk: most prompt tokens that one step works on, so that a long prompt does not stall
            the tokens of the others.
        prefix_cache: keep keys and values of finished requests for prompts that begin alike.
        dtype: of weights and cache: ``float32``, ``bf16``, or ``auto`` (as the weights are saved).
        cache_dtype: of keys and values in memory: ``auto`` is ``dtype``; ``int8`` holds two to four times
            as many tokens and attends more slowly.
        deterministic: the same request gives the same tokens whatever else is in the batch, with and
            without the prefix cache.
        speculation: guess tokens and let the model check several at a time: ``ngram`` guesses that the
            text goes on as it did after the same few tokens before, ``draft`` asks a small model, and so
            does ``none`` where the model has been given one.
        num_speculative_tokens: guessed at a time.
        min_ngram: tokens of the shortest ending that ``ngram`` looks up.
        max_ngram: of the longest, which it tries first.
        compile: use kernels that are compiled, our own on a CPU and ``torch.compile``'s on a GPU: ``auto``
            where they help and a compiler is there.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    max_batch_size: int = 32
    max_queue_size: int = 256
    cache_gib: float = 0.0
    prefill_chunk: int = 256
    prefix_cache: bool = True
    dtype: str = "auto"
    cache_dtype: str = "auto"
    deterministic: bool = False
    compile: str = "auto"
    speculation: str = "none"
    num_speculative_tokens: int = 4
    min_ngram: int = 2
    max_ngram: int = 4

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}: it must be at least {least}."
            for name, least in (
                ("max_batch_size", 1),
                ("max_queue_size", 0),
                ("cache_gib", 0),
                ("prefill_chunk", 1),
                ("num_speculative_tokens", 1),
                ("min_ngram", 1),
                ("max_ngram", self.min_ngram),
            )
            if not getattr(self, name) >= least
        ]
        choices_of = {
            "dtype": DTYPES,
            "cache_dtype": CACHE_DTYPES,
            "compile": COMPILE_MODES,
            "speculation": SPECULATIONS,
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                problems.append(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        if problems:
            raise ConfigError(problems)
