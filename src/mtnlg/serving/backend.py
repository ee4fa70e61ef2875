"""The model behind the API: its engine, its tokenizer, its names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mtnlg import __version__
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.constraints.options import default_end_ids
from mtnlg.generation.dialogue_format import DialogueFormat
from mtnlg.generation.engine import Engine
from mtnlg.model import MegatronLmDecoder
from mtnlg.serving.vocabulary import Vocabulary
from mtnlg.serving.workers import Workers
from mtnlg.tokens import Tokenizer


@dataclass
class Backend:
    """What requests are answered with.

    Args:
        engine: generates; its thread must run (:meth:`Engine.start`).
        tokenizer: the model's.
        name: what requests call it.
        hidden_size: numbers of an embedding.
        start_ids: put before a text prompt, as before a document in training.
        form: how conversations are written for it.
        created: when it was loaded, in seconds since 1970.
    """

    engine: Engine
    tokenizer: Tokenizer
    name: str
    hidden_size: int
    start_ids: Sequence[int]
    form: DialogueFormat
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of_model(
        cls,
        model: MegatronLmDecoder,
        tokenizer: Tokenizer,
        name: str,
        form: DialogueFormat,
        config: EngineConfig,
    ) -> Backend:
        """The backend of a model, its engine not yet started.

        Raises:
            ConfigError: the settings do not fit the model or the machine.
        """
        start = tokenizer.special_tokens.get(tokenizer.special_names.get("bos_token", ""))
        is_known = start is not None and start < model.config.vocab_size
        is_known = is_known and model.config.architecture == "decoder"  # else the prompt is a source
        return cls(
            engine=Engine(model, tokenizer.decode, config),
            tokenizer=tokenizer,
            name=name,
            hidden_size=model.config.hidden_size,
            start_ids=[start] if is_known and start is not None else [],
            form=form,
        )

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.tokenizer)
        self.vocab_size: int = self.engine.runner.vocab_size
        self.end_ids = tuple(default_end_ids(self.tokenizer))
        # Two threads tokenize; the event loop never does.
        self.workers = Workers(2, "mtnlg-requests")
        # What may take long, so that nobody else's text waits for it: compiling rules, summaries, adapters.
        self.slow_workers = Workers(4, "mtnlg-slow")

    @cached_property
    def fingerprint(self) -> str:
        """``system_fingerprint``: changes when the same seed may give another answer."""
        return f"fp_{self.tokenizer.fingerprint[:8]}_{__version__}"

    @property
    def reads_source(self) -> bool:
        """Whether an encoder reads the prompt, and the answer is a text by itself."""
        return bool(getattr(self.engine.runner, "reads_source", False))

    @property
    def has_compiled_kernels(self) -> bool:
        """Whether kernels that were compiled for this machine do the work; slower ones do where not."""
        return bool(getattr(getattr(self.engine.runner, "kernel", None), "is_compiled", False))

    @property
    def is_alive(self) -> bool:
        """Whether the engine still takes requests."""
        return self.engine.is_alive

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token, at least 1."""
        return max((len(self.vocabulary.bytes_of(token)) for token in range(self.vocab_size)), default=1)

    def least_tokens(self, text: str) -> int:
        """A text has at least so many tokens: told without tokenizing it."""
        return len(text) // max(1, self.longest_token)

    def close(self, drain_seconds: float = 0.0) -> None:
        """Stop the engine and the threads."""
        self.engine.close(drain_seconds)
        for workers in (self.workers, self.slow_workers):
            workers.shutdown()
