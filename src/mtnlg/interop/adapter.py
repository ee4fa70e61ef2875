"""An adapter as a value: what the tuner makes, PEFT files hold and the engine mixes in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.errors import CheckpointError, ConfigError
from mtnlg.model import MegatronLmDecoder
from mtnlg.model.adapters import (
    PROMPT_NAME,
    adapted_linears,
    is_of_adapter,
    kind_beside,
    put_adapter,
    put_update,
    sizes_of,
    take_out_adapter,
    updatable,
)
from mtnlg.model.low_rank import CHILD, LowRankUpdate, low_rank_of


@dataclass(frozen=True)
class LowRank:
    """The update of one linear layer: ``W + scale * B A``, or with a magnitude DoRA's.

    Args:
        down: A, [rank, in].
        up: B, [out, rank].
        scale: what their product counts.
        magnitude: [out], DoRA's length of each row of the sum; ``None`` is plain LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """What is added to a model whose own weights stay as they are.

    Args:
        config: how it was made.
        base_fingerprint: of the model it belongs to; ``None`` where that was not recorded (files of
            others).
        low_rank: updates by the name of their linear layer (``layers.0.attention.query``).
        prompt: [num_virtual_tokens, hidden], embeddings put before the text.
        prefix: [layers, 2, key_value_heads, num_virtual_tokens, head_dim], keys and values that every
            token of the text sees.
    """

    config: AdapterConfig
    base_fingerprint: str | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    prompt: Tensor | None = None
    prefix: Tensor | None = None


def adapter_of(decoder: MegatronLmDecoder, base_fingerprint: str | None = None) -> Adapter:
    """The adapter in a whole plain ``decoder``, as a value that shares no memory with it.

    Args:
        decoder: with an adapter.
        base_fingerprint: of the decoder without it.

    Raises:
        ConfigError: the decoder has none.
    """
    if decoder.adapter is None:
        raise ConfigError("the model has no adapter.")
    values = {name: item.detach() for name, item in decoder.named_parameters() if is_of_adapter(name)}
    found = adapter_from_values(decoder.adapter, values, base_fingerprint)
    low_rank = dict(found.low_rank)
    for name, linear in adapted_linears(decoder):
        update = low_rank_of(linear)
        assert update is not None
        low_rank[name] = replace(low_rank[name], scale=update.scale)  # layers may differ in it
    return replace(found, low_rank=low_rank)


def adapter_from_values(
    config: AdapterConfig, values: dict[str, Tensor], base_fingerprint: str | None = None
) -> Adapter:
    """An adapter from its parameters, whole, by their names in the model; they are copied."""
    values = {name: value.detach().clone() for name, value in values.items()}
    low_rank, ending = {}, f".{CHILD}.down"
    for name in values:
        if name.endswith(ending):
            linear = name.removesuffix(ending)
            parts = (values.get(f"{linear}.{CHILD}.{part}") for part in ("down", "up", "magnitude"))
            down, up, magnitude = parts
            assert down is not None and up is not None
            low_rank[linear] = LowRank(down, up, config.scale, magnitude)
    numbers = sorted(int(name.split(".")[1]) for name in values if name.endswith(".prefix.key"))
    prefix = None
    if numbers:
        names = [f"layers.{number}.attention.prefix" for number in numbers]
        pairs = [torch.stack([values[f"{name}.key"], values[f"{name}.value"]]) for name in names]
        prefix = torch.stack(pairs)
    return Adapter(config, base_fingerprint, low_rank, values.get(PROMPT_NAME), prefix)


def values_of(adapter: Adapter) -> dict[str, Tensor]:
    """The parameters of an adapter by their names in the model, sharing memory."""
    values = {} if adapter.prompt is None else {PROMPT_NAME: adapter.prompt}
    for name, one in adapter.low_rank.items():
        values |= {f"{name}.{CHILD}.down": one.down, f"{name}.{CHILD}.up": one.up}
        if one.magnitude is not None:
            values[f"{name}.{CHILD}.magnitude"] = one.magnitude
    for number, (key, value) in enumerate([] if adapter.prefix is None else adapter.prefix):
        name = f"layers.{number}.attention.prefix"
        values |= {f"{name}.key": key, f"{name}.value": value}
    return values


@torch.no_grad()
def load_adapter(decoder: MegatronLmDecoder, adapter: Adapter) -> None:
    """Put ``adapter`` into ``decoder``, in the place of one that is there.

    Raises:
        CheckpointError: its parameters are not those of this model; the first are named.
    """
    take_out_adapter(decoder)
    if adapter.config.method == "lora":
        _put_updates(decoder, adapter)
    else:
        put_adapter(decoder, adapter.config)
    places = {name: item for name, item in decoder.named_parameters() if is_of_adapter(name)}
    values = values_of(adapter)
    problems = [f"{name} is missing" for name in places.keys() - values.keys()]
    problems += [f"{name} is not in this model" for name in values.keys() - places.keys()]
    problems += _wrong_shapes(places, values)
    if problems:
        take_out_adapter(decoder)
        raise CheckpointError(f"the adapter does not fit the model: {'; '.join(sorted(problems)[:6])}.")
    for name, place in places.items():
        place.copy_(values[name])


def _put_updates(decoder: MegatronLmDecoder, adapter: Adapter) -> None:
    """Updates as the adapter has them: their ranks and scales may differ from layer to layer."""
    decoder.requires_grad_(False)
    decoder.adapter = adapter.config
    modules = updatable(decoder)
    for name, one in adapter.low_rank.items():
        if name in modules:
            sizes = (*sizes_of(modules[name]), len(one.down), one.scale, adapter.config.dropout)
            update = LowRankUpdate(*sizes, one.magnitude is not None, **kind_beside(modules[name]))
            put_update(decoder, name, update)


def _wrong_shapes(places: dict[str, Any], values: dict[str, Tensor]) -> list[str]:
    return [
        f"{name} has the shape {list(values[name].shape)}, the model wants {list(place.shape)}"
        for name, place in places.items()
        if name in values and values[name].shape != place.shape
    ]
