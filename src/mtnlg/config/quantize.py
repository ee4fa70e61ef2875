"""In which numbers the matrices of a quantized model are kept."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from mtnlg.config.errors import ConfigError

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig

WEIGHTS = ("int8", "int4", "float8")
ACTIVATIONS = ("float", "int8")
HEADS = ("float", "int8", "same")
INT4_GROUP = 32  # as llama.cpp's q4_0


@dataclass(frozen=True)
class QuantizeConfig:
    """How linear layers are quantized; ``quantize_config`` of a model, and what ``--quantize`` says.

    Args:
        weights: ``int8``, ``int4``, or ``float8`` (e4m3).
        group_size: inputs of a row that share a scale; 0 is the whole row. ``None`` is 32 with ``int4``
            and the whole row otherwise.
        symmetric: zero is the middle of the range; otherwise each group has a zero point of its own.
        activations: ``float``, or ``int8``: each token's inputs are rounded to 8 bits under a scale of
            their own, so that products are of integers.
        head: the output projection over the vocabulary: ``float``, ``int8`` (a scale for each row), or
            ``same`` as the other matrices.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    weights: str = "int8"
    group_size: int | None = None
    symmetric: bool = True
    activations: str = "float"
    head: str = "int8"

    def __post_init__(self) -> None:
        problems = []
        choices_of = {"weights": WEIGHTS, "activations": ACTIVATIONS, "head": HEADS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                problems.append(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or size < 0 or size % 2):
            problems.append(f"group_size is {size!r}: it must be an even number, or 0 for whole rows.")
        if not isinstance(self.symmetric, bool):
            problems.append(f"symmetric is {self.symmetric!r}: expected true or false.")
        if self.weights == "float8" and not self.symmetric:
            problems.append("symmetric is False: float8 has no zero point.")
        if problems:
            raise ConfigError([f"quantize_config.{problem}" for problem in problems])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> QuantizeConfig:
        """From plain values; ``None`` is the defaults.

        Raises:
            ConfigError: a key is unknown (the nearest is suggested) or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        problems = []
        for key in values or {}:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                problems.append(f"quantize_config.{key} is not a setting: {hint}")
        if problems:
            raise ConfigError(problems)
        return cls(**(values or {}))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    @property
    def bits(self) -> int:
        """Of one weight."""
        return 4 if self.weights == "int4" else 8

    @property
    def inputs_per_scale(self) -> int:
        """Inputs that share a scale, derived if need be; 0 is the whole row."""
        if self.group_size is None:
            return INT4_GROUP if self.weights == "int4" else 0
        return self.group_size

    def for_head(self) -> QuantizeConfig | None:
        """How the output projection is kept; ``None`` is in floating point."""
        if self.head == "int8":
            return QuantizeConfig("int8", activations=self.activations, head=self.head)
        return self if self.head == "same" else None


def quantize_problems(quantize: bool, config: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with the two fields of a model's config."""
    if config is not None and not quantize:
        return ["quantize_config is given and quantize is off: turn it on, or leave quantize_config out."]
    try:
        QuantizeConfig.from_dict(config)
    except ConfigError as error:
        return error.problems
    return []


def aware_problems(quantize: bool, tensor_parallel_size: int, trains_adapter: bool) -> list[str]:
    """What a run that trains a quantized model's own matrices cannot have beside it."""
    if not quantize or trains_adapter or tensor_parallel_size == 1:
        return []
    return [
        f"layout.tensor_parallel_size is {tensor_parallel_size}: with model.quantize the matrices are "
        "rounded whole; use pipeline or data parallelism."
    ]


def with_quantization(
    model: MegatronModelConfig, asked: bool | Mapping[str, Any] | QuantizeConfig | None
) -> MegatronModelConfig:
    """The architecture with its matrices in few bits, or not.

    Args:
        model: the architecture.
        asked: ``None`` leaves it as it is, ``False`` takes quantization off, ``True`` is the model's own
            ``quantize_config`` or the defaults, others say how.

    Raises:
        ConfigError: a key is unknown or a value is out of range.
    """
    if asked is None or (asked is True and model.quantize):
        return model
    if isinstance(asked, bool):
        return replace(model, quantize=asked, quantize_config=None)
    config = asked if isinstance(asked, QuantizeConfig) else QuantizeConfig.from_dict(asked)
    return replace(model, quantize=True, quantize_config=config.to_dict())
