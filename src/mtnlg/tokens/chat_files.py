"""Where a tokenizer's folder keeps its chat templates: read every usual place, write today's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtnlg.config.errors import DataError

FILE_NAME = "chat_template.jinja"
MORE_FOLDER = "additional_chat_templates"
DEFAULT_NAME = "default"

Templates = dict[str, str]


def read_templates(folder: Path, settings: dict[str, Any]) -> Templates:
    """All templates of a folder by name.

    ``chat_template.jinja`` and ``additional_chat_templates/NAME.jinja`` go before ``chat_template`` in
    ``tokenizer_config.json``, which is a text or a list of ``{"name": ..., "template": ...}``.

    Raises:
        DataError: the entry has another form, or a file is no UTF-8.
    """
    templates = templates_of(settings.get("chat_template"), str(folder))
    files = sorted((folder / MORE_FOLDER).glob("*.jinja"))
    named = [(file.stem, file) for file in files]
    if (folder / FILE_NAME).is_file():
        named.append((DEFAULT_NAME, folder / FILE_NAME))
    for name, file in named:
        try:
            templates[name] = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no UTF-8 text: {error}") from error
    return templates


def templates_of(entry: Any, where: str) -> Templates:
    """Templates by name from what ``tokenizer_config.json`` may say.

    Raises:
        DataError: it is neither a text, nor a mapping of texts, nor a list of named ones.
    """
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {DEFAULT_NAME: entry}
    try:
        pairs = (
            list(entry.items()) if isinstance(entry, dict) else [(e["name"], e["template"]) for e in entry]
        )
        if all(isinstance(name, str) and isinstance(template, str) for name, template in pairs):
            return dict(pairs)
    except (TypeError, KeyError):
        pairs = []
    raise DataError(f"{where}: chat_template must be a text or a list of objects with name and template.")


def write_templates(folder: Path, templates: Templates) -> None:
    """Put templates where transformers does, and take away those of an earlier tokenizer there."""
    more = folder / MORE_FOLDER
    wanted = {more / f"{name}.jinja": text for name, text in templates.items() if name != DEFAULT_NAME}
    if DEFAULT_NAME in templates:
        wanted[folder / FILE_NAME] = templates[DEFAULT_NAME]
    for file in {folder / FILE_NAME, *more.glob("*.jinja")} - wanted.keys():
        file.unlink(missing_ok=True)
    for file, text in wanted.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
