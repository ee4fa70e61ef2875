"""Settings that a ``config.json`` says in more than one key: activations, positions, windows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mtnlg.config import CheckpointError, MegatronModelConfig

Values = dict[str, Any]

PLAIN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
}
GATED_ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
    "relu": "reglu",
}


_ORIGINAL = "original_max_position_embeddings"


class Setting(Protocol):
    """Some fields of ours and the keys that say them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Our fields that are said here."""

    def read(self, values: Values, where: str) -> Values:
        """Our fields for the keys of a parsed ``config.json``.

        Raises:
            CheckpointError: what they say is not ours to compute; ``where`` is named.
        """

    def write(self, config: MegatronModelConfig) -> Values:
        """The keys."""

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """Why the keys cannot say what ``config`` has; empty where they can."""


@dataclass(frozen=True)
class Activation:
    """The activation function.

    Args:
        key: where it is named.
        known: their names → ours.
    """

    key: str
    known: dict[str, str]
    names: tuple[str, ...] = ("activation_function",)

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        name = values[self.key]
        if name not in self.known:
            known = ", ".join(self.known)
            raise CheckpointError(f"{where}: activation {name!r} is unknown: one of {known} is.")
        return dict(activation_function=self.known[name])

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        names = {ours: theirs for theirs, ours in reversed(self.known.items())}
        return {self.key: names[config.activation_function]}

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        if config.activation_function in self.known.values():
            return []
        known = ", ".join(dict.fromkeys(self.known.values()))
        return [f"activation_function is {config.activation_function!r}: it must be one of {known}."]


@dataclass(frozen=True)
class Rotary:
    """Rotary positions.

    Args:
        kinds: ways to scale them that the family computes.
        base: where no key says it.
        percent: likewise the share of a head that is rotated.
        is_partial: whether that may be less than all.
        keys: older keys of base and share.
    """

    kinds: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3", "longrope")
    base: float = 10000.0
    percent: float = 1.0
    is_partial: bool = False
    keys: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    names: tuple[str, ...] = ("rotary_base", "rotary_percent", "rotary_scaling")

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        base_key, percent_key = self.keys
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        percent = rope.pop("partial_rotary_factor", values.get(percent_key, self.percent))
        if percent != 1.0 and not self.is_partial:
            raise CheckpointError(f"{where}: partial_rotary_factor is {percent}: only 1.0 can be computed.")
        return dict(
            rotary_base=float(rope.pop("rope_theta", values.get(base_key, self.base))),
            rotary_percent=float(percent),
            rotary_scaling=self.read_scaling(rope, values, where),
        )

    def read_scaling(self, rope: Values, values: Values, where: str) -> Values | None:
        """``rotary_scaling`` from what is left of ``rope_parameters`` without base and share."""
        rope = {key: value for key, value in rope.items() if value is not None}
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        kind = "longrope" if kind == "su" else kind
        if kind == "default":
            return None
        if kind not in self.kinds:
            known = ", ".join(("default", *self.kinds))
            raise CheckpointError(f"{where}: rotary positions are scaled ({kind!r}): only {known} can be.")
        if kind in ("yarn", "llama3", "longrope"):
            longest, outside = values["max_position_embeddings"], values.get(_ORIGINAL)
            rope[_ORIGINAL] = outside or rope.get(_ORIGINAL, longest)
            if kind == "yarn":
                rope.setdefault("factor", longest / rope[_ORIGINAL])
        return {"rope_type": kind, **rope}

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        scaling = config.rotary_scaling or dict(rope_type="default")
        rope = {**scaling, "rope_theta": config.rotary_base}
        base_key, percent_key = self.keys
        written: Values = {base_key: config.rotary_base}  # read by transformers before 5
        if self.is_partial:
            rope["partial_rotary_factor"] = written[percent_key] = config.rotary_percent
        if config.rotary_scaling is not None:
            written["rope_scaling"] = dict(rope)
        return written | dict(rope_parameters=rope)  # read since

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        problems = []
        if config.rotary_percent != 1.0 and not self.is_partial:
            problems.append(f"rotary_percent is {config.rotary_percent}: it must be 1.0.")
        kind = "default" if config.rotary_scaling is None else config.rotary_scaling["rope_type"]
        if kind not in ("default", *self.kinds):
            known = ", ".join(("none", *self.kinds))
            problems.append(f"rotary_scaling is {kind}: it must be {known}.")
        return problems


@dataclass(frozen=True)
class Phi3Rotary(Rotary):
    """Rotary positions whose original length stands beside them, not among them."""

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        original = (config.rotary_scaling or {}).get("original_max_position_embeddings")
        return super().write(config) | dict(
            original_max_position_embeddings=original or config.max_position_embeddings
        )


@dataclass(frozen=True)
class TwoRotaries(Rotary):
    """Rotary positions of two kinds: of layers that see everything, and of those with a window."""

    local_base: float = 10000.0
    names: tuple[str, ...] = ("rotary_base", "rotary_percent", "rotary_scaling", "rotary_local_base")

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        kinds = values.get("rope_parameters") or {}
        everywhere = kinds.get("full_attention") or values.get("rope_scaling") or {}
        local = kinds.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise CheckpointError(f"{where}: positions of layers with a window are scaled; they cannot be.")
        found = super().read({**values, "rope_parameters": everywhere, "rope_scaling": None}, where)
        base: Any = local.get("rope_theta", values.get("rope_local_base_freq", self.local_base))
        return found | dict(rotary_local_base=float(base))

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        written = super().write(config)
        local = config.rotary_local_base or config.rotary_base
        kinds = dict(
            full_attention=written["rope_parameters"],
            sliding_attention=dict(rope_type="default", rope_theta=local),
        )
        return written | dict(rope_parameters=kinds, rope_local_base_freq=local)

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        problems = super().obstacles(config)
        if config.sliding_window is None:
            problems.append("sliding_window is None: it must be given, with layers that have it.")
        return problems


def _no_layer(layer: int, values: Values) -> bool:
    return False


@dataclass(frozen=True)
class Window:
    """Layers that see only so many tokens back.

    Args:
        sees_all: whether a layer does all the same, where ``layer_types`` is left out.
        has_layers: whether the family has ``layer_types``.
        has_switch: whether it has ``use_sliding_window``.
    """

    sees_all: Callable[[int, Values], bool] = _no_layer
    has_layers: bool = False
    has_switch: bool = False
    names: tuple[str, ...] = field(default=("sliding_window", "full_attention_layers"))

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        none: Values = dict(sliding_window=None, full_attention_layers=None)
        window = values.get("sliding_window")
        if not window or (self.has_switch and not values.get("use_sliding_window", False)):
            return none
        count = values["num_hidden_layers"]
        kinds = values.get("layer_types") if self.has_layers else None
        unknown = sorted({*(kinds or ())} - {"full_attention", "sliding_attention"})
        if unknown:
            raise CheckpointError(
                f"{where}: layer_types has {', '.join(unknown)}: that cannot be computed."
            )
        if kinds is None:
            kinds = [
                "full_attention" if self.sees_all(layer, values) else "sliding_attention"
                for layer in range(count)
            ]
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        if len(full) == count:
            return none
        return dict(sliding_window=window, full_attention_layers=full or None)

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        written: Values = dict(sliding_window=config.sliding_window)
        if self.has_switch:
            written["use_sliding_window"] = config.sliding_window is not None
        if self.has_layers:
            windows = map(config.window_of_layer, range(config.num_hidden_layers))
            written["layer_types"] = [
                "full_attention" if window is None else "sliding_attention" for window in windows
            ]
        return written

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        if self.has_layers or not config.full_attention_layers:
            return []
        return [f"full_attention_layers is {config.full_attention_layers}: it must be None."]


@dataclass(frozen=True)
class ScaledEmbedding:
    """Embeddings times the square root of the hidden size (Gemma)."""

    names: tuple[str, ...] = ("embedding_scale",)

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        return dict(embedding_scale=values["hidden_size"] ** 0.5)

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        return {}

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        expected = config.hidden_size**0.5
        if config.embedding_scale is not None and abs(config.embedding_scale - expected) < 1e-9 * expected:
            return []
        return [f"embedding_scale is {config.embedding_scale}: it must be sqrt(hidden_size), {expected}."]


@dataclass(frozen=True)
class EmbeddingDropout:
    """A dropout after the embedding with a key of its own, where we have that of the layers.

    Args:
        key: its.
        layer_key: that of the layers.
    """

    key: str
    layer_key: str
    names: tuple[str, ...] = ()

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        layers = values[self.layer_key]
        found = values.get(self.key, layers)
        if found != layers:
            warnings.warn(
                f"{where}: {self.key} ({found}) differs from {self.layer_key} ({layers}); training on "
                "would use the latter for both.",
                stacklevel=2,
            )
        return {}

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        return {self.key: config.hidden_dropout}

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        return []


@dataclass(frozen=True)
class OneBias:
    """One key for the biases of attention and MLP."""

    key: str
    names: tuple[str, ...] = ("attention_bias", "attention_output_bias", "mlp_bias")

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        return dict.fromkeys(self.names, values[self.key])

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        return {self.key: config.attention_bias}

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        have = (config.has_attention_output_bias, config.mlp_bias)
        return [
            f"{name} is {has}: it must be that of attention_bias ({config.attention_bias})."
            for name, has in zip(self.names[1:], have)
            if has != config.attention_bias
        ]


@dataclass(frozen=True)
class PreNorm:
    """A switch between norms before and after each sub-block (OPT)."""

    key: str
    names: tuple[str, ...] = ("norm_placement",)

    def read(self, values: Values, where: str) -> Values:
        """See :class:`Setting`."""
        return dict(norm_placement="before" if values[self.key] else "after")

    def write(self, config: MegatronModelConfig) -> Values:
        """See :class:`Setting`."""
        return {self.key: config.norm_placement == "before"}

    def obstacles(self, config: MegatronModelConfig) -> list[str]:
        """See :class:`Setting`."""
        if config.norm_placement in ("before", "after"):
            return []
        return [f"norm_placement is {config.norm_placement}: it must be before or after."]
