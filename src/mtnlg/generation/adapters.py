"""Adapters that requests may choose between: what is loaded, under which names, and whether it fits."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mtnlg.config import MegatronModelConfig
from mtnlg.config.errors import CheckpointError, ConfigError
from mtnlg.interop.adapter import Adapter, adapter_of, load_adapter
from mtnlg.interop.fingerprint import check_base, fingerprint_of
from mtnlg.interop.peft import read_adapter
from mtnlg.model import LanguageModel, MegatronLmDecoder
from mtnlg.model.adapters import sizes_of, take_out_adapter, updatable
from mtnlg.model.virtual_tokens import prompt_with_virtual


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter that requests can name.

    Args:
        name: what they call it.
        serial: 1, 2, 3, ...: of all that an engine ever loaded. Keys and values computed under one are
            of no use under another.
        adapter: the values.
        loaded: when, in seconds since 1970.
    """

    name: str
    serial: int
    adapter: Adapter
    loaded: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_virtual(self) -> int:
        """Virtual tokens that it puts into every prompt."""
        return self.adapter.config.num_positions

    def prompt_ids(self, ids: Sequence[int], vocab_size: int) -> list[int]:
        """A prompt with its virtual tokens, whose ids are ``vocab_size`` and up."""
        return prompt_with_virtual(list(ids), self.adapter.config, vocab_size)


def own_adapter_of(model: MegatronLmDecoder) -> LoadedAdapter | None:
    """The adapter that is in a model, as its values are now, for rows that name none."""
    return None if model.adapter is None else LoadedAdapter("", 0, adapter_of(model))


class AdapterShelf:
    """The adapters of one engine by name; any thread may ask and change it.

    One that is taken away goes on serving the requests that began with it.

    Args:
        model: whose adapters they are.
        is_able: whether the engine's runner can mix them in.
    """

    def __init__(self, model: LanguageModel, is_able: bool) -> None:
        self._decoder = model if isinstance(model, MegatronLmDecoder) and is_able else None
        self._loaded: dict[str, LoadedAdapter] = {}
        self._serials = itertools.count(1)
        self._lock = threading.Lock()
        self._known: str | None = None  # fingerprint of weights in files, which do not change

    def add(self, name: str, adapter: Adapter) -> LoadedAdapter:
        """Load an adapter; requests may name it from now on.

        Raises:
            ConfigError: the name is taken, or this engine cannot mix adapters in.
            CheckpointError: its tensors are not those of this model; the first are named.
        """
        decoder = self._able_decoder()
        if decoder.adapter is not None:
            raise ConfigError("the model has an adapter in it already: load the model without it.")
        check_fits(decoder, adapter)
        with self._lock:
            if name in self._loaded:
                raise ConfigError(
                    f"there is an adapter {name!r} already: remove it, or choose another name."
                )
            found = self._loaded[name] = LoadedAdapter(name, next(self._serials), adapter)
        return found

    def load(self, name: str, folder: Path) -> LoadedAdapter:
        """Read an adapter's folder, as PEFT and ``mtnlg tune`` write them, and :meth:`add` it.

        Raises:
            ConfigError: see :meth:`add`.
            CheckpointError: its files are broken, or it was made for another model.
        """
        decoder = self._able_decoder()
        adapter = read_adapter(folder, decoder.config)
        if adapter.base_fingerprint is not None:
            check_base(adapter.base_fingerprint, self._fingerprint(decoder), str(folder))
        return self.add(name, adapter)

    def _fingerprint(self, decoder: MegatronLmDecoder) -> str:
        """Of the weights, which may be on other ranks."""
        if self._known is None:
            read = getattr(decoder, "read_fingerprint", None)
            self._known = read() if read is not None else None
        return self._known or fingerprint_of(decoder)

    def _able_decoder(self) -> MegatronLmDecoder:
        if self._decoder is None:
            raise ConfigError(
                "adapters are mixed into decoders by the engine's own runners: this model or runner is "
                "another. Merge the adapter into the weights (mtnlg export ADAPTER)."
            )
        return self._decoder

    def remove(self, name: str) -> None:
        """Take an adapter away: new requests cannot name it, running ones end with it.

        Raises:
            ConfigError: there is none of this name.
        """
        with self._lock:
            if self._loaded.pop(name, None) is None:
                raise ConfigError(self._unknown(name))

    def get(self, name: str | None) -> LoadedAdapter | None:
        """The adapter of this name; ``None`` is no adapter.

        Raises:
            ConfigError: there is none of this name.
        """
        if name is None:
            return None
        with self._lock:
            found = self._loaded.get(name)
            if found is None:
                raise ConfigError(self._unknown(name))
        return found

    @property
    def loaded(self) -> list[LoadedAdapter]:
        """All that can be named, in the order of loading."""
        with self._lock:
            return list(self._loaded.values())

    @property
    def names(self) -> list[str]:
        """Of all that are loaded, in the order of loading."""
        with self._lock:
            return list(self._loaded)

    def _unknown(self, name: str) -> str:
        there = f"there are {', '.join(self._loaded)}" if self._loaded else "none is loaded"
        return f"there is no adapter {name!r}: {there}."


def check_fits(model: MegatronLmDecoder, adapter: Adapter) -> None:
    """Raise CheckpointError unless every tensor of ``adapter`` has its place in ``model``."""
    problems = []
    linears = updatable(model)
    for name, one in adapter.low_rank.items():
        if name not in linears:
            problems.append(f"it changes {name}, which is no linear layer of this model")
            continue
        wanted = sizes_of(linears[name])
        found = (one.down.shape[1], one.up.shape[0])
        if found != wanted:
            problems.append(f"its update of {name} is {_to(found)}, the layer {_to(wanted)}")
    problems += _virtual_problems(model.config, adapter)
    if problems:
        raise CheckpointError(f"the adapter does not fit the model: {'; '.join(problems[:6])}.")


def _to(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} to {sizes[1]}"


def _virtual_problems(config: MegatronModelConfig, adapter: Adapter) -> list[str]:
    count, problems = adapter.config.num_positions, []
    prompt, prefix = adapter.prompt, adapter.prefix
    if prompt is not None and tuple(prompt.shape) != (count, config.embedding_width):
        wanted = [count, config.embedding_width]
        problems.append(f"its virtual tokens have the shape {list(prompt.shape)}, the model wants {wanted}")
    heads, size = config.key_value_heads, config.head_size
    if prefix is not None and tuple(prefix.shape) != (config.num_hidden_layers, 2, heads, count, size):
        shape = [config.num_hidden_layers, 2, heads, count, size]
        problems.append(f"its prefix has the shape {list(prefix.shape)}, the model wants {shape}")
    if count >= config.max_position_embeddings:
        problems.append(f"its {count} virtual tokens leave none of the model's positions")
    return problems


class OneAtATime:
    """Puts one adapter after the other into a plain model, and takes the last one out at the end.

    Args:
        model: stays as it was outside of :meth:`applied`.
    """

    def __init__(self, model: MegatronLmDecoder) -> None:
        self._model = model

    @contextmanager
    def applied(self, loaded: LoadedAdapter | None) -> Iterator[None]:
        """The model with this adapter in it."""
        if loaded is None:
            yield
            return
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        load_adapter(self._model, loaded.adapter)
        try:
            yield
        finally:
            take_out_adapter(self._model)
            for parameter in trained:
                parameter.requires_grad_()
