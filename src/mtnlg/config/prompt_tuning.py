"""The ``prompt_tuning_*`` fields of a model's config: what they may say, and the adapter they describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtnlg.config.adapter import PROMPT_STYLES, AdapterConfig
from mtnlg.config.errors import ConfigError

if TYPE_CHECKING:
    from mtnlg.config.model import MegatronModelConfig

DEFAULT_TOKENS = 20
ARGS_TYPES = ("dict", "list")
ARGS = ("prefix", "suffix")  # what a style takes; a list has them in this order


def prompt_tuning_problems(config: MegatronModelConfig) -> list[str]:
    """Everything that is wrong with the fields, whether or not prompt tuning is on."""
    problems = []
    least = {"num_tokens": 0, "update_every_n_steps": 1, "max_seq_length": 1, "vocab_size": 1}
    for name, smallest in least.items():
        value = getattr(config, f"prompt_tuning_{name}")
        if value is not None and value < smallest:
            problems.append(f"prompt_tuning_{name} is {value}: it must be at least {smallest}.")
    multiplier = config.prompt_tuning_lr_multiplier
    if multiplier is not None and not multiplier > 0.0:
        problems.append(f"prompt_tuning_lr_multiplier is {multiplier}: it must be greater than 0.")
    drawn = config.prompt_tuning_vocab_size
    if config.prompt_tuning and drawn is not None and drawn > config.vocab_size:
        problems.append(
            f"prompt_tuning_vocab_size is {drawn}: virtual tokens begin as tokens of the vocabulary, "
            f"which has {config.vocab_size}."
        )
    if config.prompt_tuning and config.prompt_tuning_num_tokens == 0:
        problems.append("prompt_tuning_num_tokens is 0: prompt_tuning needs at least one, or leave it off.")
    if config.prompt_tuning and config.architecture != "decoder":
        problems.append("prompt_tuning is true: an encoder-decoder has no virtual tokens; use lora.")
    for name, valid in (("prompt_style", PROMPT_STYLES), ("prompt_style_args_type", ARGS_TYPES)):
        value = getattr(config, f"prompt_tuning_{name}")
        if value is not None and value not in valid:
            problems.append(f"prompt_tuning_{name} is {value!r}: choose one of {', '.join(valid)}.")
    if not problems:
        problems = _args_problems(config)
    if config.prompt_tuning and not problems:
        try:
            prompt_adapter(config)
        except ConfigError as error:
            problems = [f"prompt_tuning_{problem}" for problem in error.problems]
    return problems


def prompt_adapter(config: MegatronModelConfig) -> AdapterConfig | None:
    """The adapter that the fields describe; ``None`` where prompt tuning is off."""
    if not config.prompt_tuning:
        return None
    args = _style_args(config)
    return AdapterConfig(
        method="prompt",
        num_virtual_tokens=config.prompt_tuning_num_tokens or DEFAULT_TOKENS,
        init_text=config.prompt_tuning_init_text or "",
        init_vocab_size=config.prompt_tuning_vocab_size,
        update_every_n_steps=config.prompt_tuning_update_every_n_steps or 1,
        lr_multiplier=config.prompt_tuning_lr_multiplier or 1.0,
        max_seq_length=config.prompt_tuning_max_seq_length,
        prompt_style=config.prompt_tuning_prompt_style or PROMPT_STYLES[0],
        prefix=args.get("prefix", ""),
        suffix=args.get("suffix", ""),
    )


def _style_args(config: MegatronModelConfig) -> dict[str, Any]:
    """Of the style, whichever way they are given; ``_values`` win over ``_args``."""
    values = config.prompt_tuning_prompt_style_args_values or []
    keys = config.prompt_tuning_prompt_style_args_keys or []
    if config.prompt_tuning_prompt_style_args_type == "list":
        keys = list(ARGS)
    return {**(config.prompt_tuning_prompt_style_args or {}), **dict(zip(keys, values))}


def _args_problems(config: MegatronModelConfig) -> list[str]:
    name = "prompt_tuning_prompt_style_args"
    keys = config.prompt_tuning_prompt_style_args_keys or []
    values = config.prompt_tuning_prompt_style_args_values or []
    if config.prompt_tuning_prompt_style_args_type == "list":
        if keys or len(values) > len(ARGS):
            return [
                f"{name}_type is 'list': {name}_values are {' and '.join(ARGS)} in this order, and "
                f"{name}_keys stays empty."
            ]
    elif len(keys) != len(values):
        return [f"{name}_keys has {len(keys)} names and {name}_values {len(values)}: as many of each."]
    args = _style_args(config)
    foreign = [key for key in args if key not in ARGS]
    if foreign:
        return [f"{name} names {foreign[0]!r}: a style takes {' and '.join(ARGS)}."]
    wrong = [key for key, value in args.items() if not isinstance(value, str)]
    return [f"{name}: {key} is {args[key]!r}, it must be text." for key in wrong]
