"""Positions, windows and norms of a model's config: which of their settings go together."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig

# rope_type: what it needs, and what it may have besides
ROTARY_SCALINGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset(["factor"]), frozenset()),
    "dynamic": (frozenset(["factor"]), frozenset()),
    "llama3": (
        frozenset(["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]),
        frozenset(),
    ),
    "yarn": (
        frozenset(["factor", "original_max_position_embeddings"]),
        frozenset(["attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"]),
    ),
    "longrope": (
        frozenset(["short_factor", "long_factor", "original_max_position_embeddings"]),
        frozenset(["factor", "attention_factor"]),
    ),
}


def attention_problems(config: MegatronModelConfig) -> list[str]:
    """Every reason why positions, windows and norms do not fit together."""
    return _position_problems(config) + _window_problems(config) + _norm_problems(config)


def reach(config: MegatronModelConfig) -> int:
    """See ``MegatronModelConfig.max_cached_length``."""
    scaling, longest = config.rotary_scaling, config.max_position_embeddings
    if scaling is not None and scaling["rope_type"] == "longrope":
        return min(longest, int(scaling["original_max_position_embeddings"]))
    return longest  # where "dynamic" begins to scale


def follows_length(config: MegatronModelConfig) -> bool:
    """Whether rotary frequencies depend on how long the text is."""
    return config.rotary_scaling is not None and config.rotary_scaling["rope_type"] in (
        "dynamic",
        "longrope",
    )


def _position_problems(config: MegatronModelConfig) -> list[str]:
    problems = []
    kind = config.position_embedding
    if config.position_offset < 0:
        problems.append(f"position_offset is {config.position_offset}: it must be at least 0.")
    if config.position_offset and kind != "learned":
        problems.append(
            f"position_offset is {config.position_offset}: only position_embedding: learned has rows to "
            "leave out."
        )
    if config.rotary_scaling is not None:
        if kind != "rotary":
            problems.append(f"rotary_scaling is given: position_embedding is {kind}; set it to rotary.")
        problems += _scaling_problems(config.rotary_scaling, config.rotary_dim // 2)
    if config.rotary_local_base is not None and (kind != "rotary" or config.sliding_window is None):
        problems.append(
            f"rotary_local_base is {config.rotary_local_base}: it needs position_embedding: rotary and a "
            "sliding_window."
        )
    return problems


def _scaling_problems(scaling: dict[str, Any], pairs: int) -> list[str]:
    kind = scaling.get("rope_type")
    if kind not in ROTARY_SCALINGS:
        near = difflib.get_close_matches(str(kind), ROTARY_SCALINGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(ROTARY_SCALINGS)}."
        return [f"rotary_scaling.rope_type is {kind!r}: {hint}"]
    needed, allowed = ROTARY_SCALINGS[kind]
    given = {name for name, value in scaling.items() if value is not None} - {"rope_type"}
    problems = [f"rotary_scaling.{name} is missing: {kind} needs it." for name in sorted(needed - given)]
    problems += [
        f"rotary_scaling.{name} is given: {kind} has only {', '.join(sorted(needed | allowed))}."
        for name in sorted(given - needed - allowed)
    ]
    for name in sorted(given & (needed | allowed)):
        problems += _number_problems(f"rotary_scaling.{name}", scaling[name], pairs)
    if kind == "llama3" and not problems and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        problems.append(
            f"rotary_scaling.high_freq_factor is {scaling['high_freq_factor']}: it must be greater than "
            f"low_freq_factor ({scaling['low_freq_factor']})."
        )
    return problems


def _number_problems(name: str, value: Any, pairs: int) -> list[str]:
    if name.endswith(".truncate"):
        return [] if isinstance(value, bool) else [f"{name} is {value!r}: expected true or false."]
    if name.endswith((".short_factor", ".long_factor")):
        if isinstance(value, list) and len(value) == pairs and all(map(_is_positive, value)):
            return []
        return [f"{name} is {value!r}: expected {pairs} numbers, one for each rotated pair of dimensions."]
    return [] if _is_positive(value) else [f"{name} is {value!r}: expected a number greater than 0."]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _window_problems(config: MegatronModelConfig) -> list[str]:
    layers = config.full_attention_layers
    if layers is None:
        return []
    if config.sliding_window is None:
        return [f"full_attention_layers is {layers}: it has no effect without a sliding_window."]
    last = config.num_hidden_layers - 1
    wrong = sorted({layer for layer in layers if not 0 <= layer <= last})
    problems = []
    if wrong:
        problems.append(
            f"full_attention_layers has {', '.join(map(str, wrong))}: layers are numbered 0 to {last}."
        )
    if len(set(layers)) != len(layers):
        problems.append(f"full_attention_layers is {layers}: it names a layer twice.")
    if len(set(layers)) > last:
        problems.append(
            "full_attention_layers has all layers: no layer is left for the sliding_window; leave both out."
        )
    return problems


def _norm_problems(config: MegatronModelConfig) -> list[str]:
    if config.parallel_residual and config.norm_placement != "before":
        return [
            f"norm_placement is {config.norm_placement}: with parallel_residual it must be before, for "
            "there is one sum after both sub-blocks."
        ]
    return []
