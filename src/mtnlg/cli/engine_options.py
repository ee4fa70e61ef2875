"""The engine's settings as options of a verb."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.config.generation import EngineConfig

OPTIONS = (
    ("max_batch_size", int, "sequences that are written at the same time"),
    ("max_queue_size", int, "sequences that may wait; a further one is refused"),
    ("cache_gib", float, "memory for keys and values; 0 is what the batch needs, with a limit"),
    ("prefill_chunk", int, "most prompt tokens of one step"),
    ("prefix_cache", bool, "keep keys and values for prompts that begin alike"),
    ("dtype", str, "float32, bf16, or auto: as the weights are saved"),
    ("cache_dtype", str, "of keys and values: auto (as dtype), or int8: more tokens in the same memory"),
    ("deterministic", bool, "the same answer whatever else is in the batch"),
    ("compile", str, "kernels that are compiled: auto, on or off"),
    ("speculation", str, "guess tokens and check several at a time: none, ngram or draft"),
    ("num_speculative_tokens", int, "guessed at a time"),
    ("min_ngram", int, "tokens of the shortest ending that ngram looks up in the text so far"),
    ("max_ngram", int, "tokens of the longest"),
)


def add_engine_arguments(parser: ArgumentParser) -> None:
    """Declare them, with the defaults of :class:`EngineConfig`."""
    from mtnlg.config.generation import EngineConfig

    for name, kind, what in OPTIONS:
        option = f"--{name.replace('_', '-')}"
        default = getattr(EngineConfig, name)
        if kind is bool and not default:
            parser.add_argument(option, action="store_true", help=what)
        else:
            parser.add_argument(option, type=kind, default=default, help=what)
    what = "small model with the same tokenizer that guesses; means --speculation draft"
    parser.add_argument("--draft-model", type=str | None, default=None, help=what)


def engine_config(arguments: Namespace) -> EngineConfig:
    """What was given.

    Raises:
        ConfigError: naming every value that is out of range.
    """
    from mtnlg.config.generation import EngineConfig

    return EngineConfig(**{name: getattr(arguments, name) for name, _kind, _what in OPTIONS})
