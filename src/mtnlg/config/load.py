"""A run's config from a YAML recipe and dotted overrides, and back into a file.

All problems of all sections are found in one pass, before anything else happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mtnlg.config.check import Checker, OverrideText, field_types, section_class, setting_names
from mtnlg.config.data import TokenizerConfig
from mtnlg.config.errors import ConfigError, NotYetError
from mtnlg.config.presets import preset_fields
from mtnlg.config.run import RunConfig, cross_section_problems
from mtnlg.config.yaml_text import parse_value, parse_yaml

Defaults = Callable[[dict[str, Any]], dict[str, Any]]
_CROSS_SECTIONS = ("model", "data", "layout", "batch", "training", "precision")


def load_run_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), defaults: Defaults | None = None
) -> RunConfig:
    """The config of a recipe with some values replaced.

    ``preset`` expands into the fields of ``model`` (fields that are written out win). A recipe
    without ``model.vocab_size`` gets ``tokenizer.sets_vocab_size``: whoever
    prepares the run then puts the tokenizer's size there.

    Args:
        path: a YAML file; ``None`` starts from the defaults.
        overrides: ``["--a.b=value", "--a.c", "value", ...]``, the leading dashes optional.
        defaults: given the sections as written, gives those that lie under them: what is not written
            is theirs.

    Raises:
        ConfigError: naming every unknown key, wrong type, value out of range and broken rule.
        NotYetError: the only thing wrong is a setting that this version cannot do yet.
    """
    values, places, problems = _read_recipe(path)
    _write_auto_out(values)
    section_names = {name for name, hint in field_types(RunConfig).items() if section_class(hint)}
    for name, text in _split_overrides(overrides):
        value = parse_value(text) if name in section_names else OverrideText(text)
        _place(values, name, value, problems)
        _write_auto_out(values)
        places[name] = f"--{name}"
    if defaults is not None:
        values = _laid_over(defaults(values), values)
    return _build(values, places, problems)


def save_run_config(config: RunConfig, path: str | Path) -> None:
    """Write ``config`` as YAML that ``load_run_config`` reads back to an equal config.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(dump_run_config(config), encoding="utf-8")
    os.replace(temporary, path)


def dump_run_config(config: RunConfig) -> str:
    """``config`` as YAML text."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def _read_recipe(path: str | Path | None) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    if path is None:
        return {}, {}, []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"the recipe {path} does not exist{_recipes_nearby(path)}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}.") from None
    values, lines, problems = parse_yaml(text, str(path))
    return values, {name: f"{path}, line {line}" for name, line in lines.items()}, problems


def _recipes_nearby(path: str | Path) -> str:
    import difflib

    folder = Path(path).parent
    names = [str(found) for found in folder.glob("*.y*ml")] if folder.is_dir() else []
    near = difflib.get_close_matches(str(path), names, n=1, cutoff=0.4)
    return f": did you mean {near[0]}?" if near else "."


def _split_overrides(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """``["--a.b=1", "--c", "2"]`` as ``[("a.b", "1"), ("c", "2")]``."""
    pairs, problems = [], []
    waiting: str | None = None
    for item in overrides:
        if waiting is not None:
            pairs.append((waiting, item))
            waiting = None
        elif "=" in item:
            name, text = item.split("=", 1)
            pairs.append((name.lstrip("-").replace("-", "_"), text))
        elif item.startswith("--") and len(item) > 2:
            waiting = item[2:].replace("-", "_")
        else:
            problems.append(f"{item!r}: expected --section.setting=value.")
    if waiting is not None:
        problems.append(f"--{waiting}: its value is missing; write --{waiting}=value.")
    if problems:
        raise ConfigError(problems)
    return pairs


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values, those of ``above`` where both have one."""
    merged = {**below, **above}
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            merged[name] = _laid_over(below[name], value)
        elif value is None and isinstance(below.get(name), dict):
            merged[name] = below[name]
    return merged


def _place(values: dict[str, Any], name: str, value: Any, problems: list[str]) -> None:
    """Put ``value`` at the dotted ``name`` of the nested ``values``."""
    *sections, last = name.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            problems.append(f"--{name}: {section} has no settings inside.")
            return
        values = inner
    values[last] = value


def _write_auto_out(values: dict[str, Any]) -> None:
    """``layout: auto`` is short for ``layout: {auto: true}``."""
    if values.get("layout") == "auto":
        values["layout"] = {"auto": True}


def _build(values: dict[str, Any], places: dict[str, str], problems: list[str]) -> RunConfig:
    vocab_size_is_open = _vocab_size_is_open(values)
    checker = Checker(setting_names(RunConfig))
    hints = field_types(RunConfig)
    plain = {key: value for key, value in values.items() if section_class(hints.get(key)) is None}
    fields = checker.fields(RunConfig, plain, "")
    sections: dict[str, Any] = {
        name: checker.fields(section, values[name], name)
        for name, hint in hints.items()
        if (section := section_class(hint)) is not None and values.get(name) is not None
    }
    problems += [_placed(name, message, places) for name, message in checker.problems]
    sections["model"] = _with_preset(fields.get("preset"), sections.get("model", {}), problems)
    if vocab_size_is_open:
        _take_vocab_size_from_tokenizer(sections)
    misread = {name.split(".")[0].split("[")[0] for name, _message in checker.problems}
    built, refusals = _build_sections(hints, sections, problems)
    if not misread.intersection(_CROSS_SECTIONS):
        with contextlib.suppress(ArithmeticError):  # of sizes already reported, such as 0
            problems += cross_section_problems(*(built[name] for name in _CROSS_SECTIONS))
    if problems:
        raise ConfigError([*problems, *map(str, refusals)])
    if refusals:
        raise refusals[0]
    return RunConfig(**fields, **built)


def _placed(name: str, message: str, places: dict[str, str]) -> str:
    return f"{message} ({places[name]})" if name in places else message


def _with_preset(preset: str | None, written: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    try:
        return {**(preset_fields(preset) if preset else {}), **written}
    except ConfigError as error:
        problems += error.problems
        return dict(written)


def _vocab_size_is_open(values: dict[str, Any]) -> bool:
    """Whether no size is written; an empty one (``null``) is taken out of ``values``."""
    model = values.get("model")
    if not isinstance(model, dict) or "vocab_size" not in model:
        return True
    is_open = model["vocab_size"] in (None, "null", "None")
    if is_open:
        del model["vocab_size"]
    return is_open


def _take_vocab_size_from_tokenizer(sections: dict[str, Any]) -> None:
    tokenizer = sections.setdefault("tokenizer", {})
    tokenizer.setdefault("sets_vocab_size", True)
    if tokenizer["sets_vocab_size"]:
        sections["model"]["vocab_size"] = tokenizer.get("vocab_size", TokenizerConfig.vocab_size)


def _build_sections(
    hints: dict[str, Any], sections: dict[str, Any], problems: list[str]
) -> tuple[dict[str, Any], list[NotYetError]]:
    """Build every section; one with problems is built as it stands, for the rules across sections."""
    built, refusals = {}, []
    for name, hint in hints.items():
        section = section_class(hint)
        if section is None or (name not in sections and section is not hint):
            continue  # plain, or a section that a run may be without
        values = sections[name] if name in sections else _default(name)
        try:
            built[name] = section(**values)
        except ConfigError as error:
            prefix = "model." if name == "model" else ""
            problems += [prefix + problem for problem in error.problems]
            built[name] = _unvalidated(section, values)
        except NotYetError as error:
            refusals.append(error)
            built[name] = _unvalidated(section, values)
    return built, refusals


def _default(name: str) -> dict[str, Any]:
    """The values of a section that is not written."""
    factory = next(field for field in dataclasses.fields(RunConfig) if field.name == name).default_factory
    assert factory is not dataclasses.MISSING
    return dict(vars(factory()))


def _unvalidated(config_class: type, values: dict[str, Any]) -> Any:
    config: Any = object.__new__(config_class)
    for field in dataclasses.fields(config_class):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        setattr(config, field.name, values.get(field.name, default))
    return config
