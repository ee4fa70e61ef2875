"""The engine behind ``model.generate``: made when it is first needed, true to the model's weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtnlg.config import ConfigError
from mtnlg.config.generation import EngineConfig
from mtnlg.generation.engine import Decode, Engine
from mtnlg.model import LanguageModel, MegatronLmDecoder

SAMPLED_WEIGHTS = 8  # numbers of each parameter that are compared
NO_LIMIT = 2**31  # whoever calls waits anyway


class EngineKeeper:
    """Keeps one engine for a model, and makes another where the model is not what it was.

    Weights may change between two calls (training goes on, a checkpoint is loaded, adapters are put in):
    the engine then prepares them anew and forgets what it computed with the old ones.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._made_for: tuple[Any, ...] = ()
        self._weights: tuple[tuple[int, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[type[EngineKeeper], tuple[()]]:
        """A copied or unpickled model makes an engine of its own."""
        return EngineKeeper, ()

    def engine(
        self,
        model: LanguageModel,
        decode: Decode | None,
        config: EngineConfig | None = None,
        use_cache: bool | None = None,
        draft_model: MegatronLmDecoder | None = None,
    ) -> Engine:
        """The engine for the model as it is now.

        Args:
            model: the decoder.
            decode: ids to text.
            config: settings; the queue has no limit here.
            use_cache: keep keys and values; ``None`` is the config's.
            draft_model: guesses tokens, where the settings say so.

        Raises:
            ConfigError: the model has no weights, or the settings do not fit it.
        """
        if _is_meta(model):
            raise ConfigError("the model is on the meta device and has no weights to generate with.")
        made_for = (_structure(model), _who(decode), config, use_cache, id(draft_model))
        with self._lock:
            weights = _weights(model)
            engine = self._engine
            if engine is None or not engine.is_alive or made_for != self._made_for:
                settings = config or EngineConfig()
                settings = EngineConfig(**{**vars(settings), "max_queue_size": NO_LIMIT})
                engine = Engine(model, decode, settings, use_cache=use_cache, draft_model=draft_model)
                self._engine, self._made_for = engine, made_for
            elif self._weights is None or not _is_same(weights, self._weights):
                engine.forget()
            self._weights = weights
        return engine


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for the time being."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _is_meta(model: LanguageModel) -> bool:
    return next(model.parameters()).is_meta and getattr(model, "make_runner", None) is None


def _who(decode: Decode | None) -> Any:
    """What stays the same between two mentions of one method."""
    return (id(getattr(decode, "__self__", decode)), getattr(decode, "__name__", ""))


def _structure(model: LanguageModel) -> tuple[Any, ...]:
    """Which modules and parameters there are, where, and what is hooked into them."""
    modules = tuple(
        (id(module), len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for module in model.modules()
    )
    functions: tuple[Callable[..., Any] | None, ...] = tuple(
        vars(module).get("attention_function") for module in model.modules()
    )
    parameters = tuple((id(one), one.dtype, one.device, one.shape) for one in model.parameters())
    return modules, functions, parameters, getattr(model, "make_runner", None)


@torch.no_grad()
def _weights(model: LanguageModel) -> tuple[tuple[int, ...], Tensor]:
    """What tells changed weights from unchanged ones: versions, places, and a few of the numbers.

    Versions count what torch sees; writing through ``.data`` it does not see, hence the numbers.
    """
    marks: list[int] = []
    samples: list[Tensor] = []
    for parameter in model.parameters():
        marks += (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLED_WEIGHTS)][:SAMPLED_WEIGHTS].float())
    return tuple(marks), torch.cat(samples)


def _is_same(left: tuple[tuple[int, ...], Tensor], right: tuple[tuple[int, ...], Tensor]) -> bool:
    return left[0] == right[0] and torch.equal(left[1], right[1])
