"""Conversations, templates and the history of what was typed, on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_conversation(path: str) -> list[dict[str, Any]]:
    """Messages of a saved conversation, in OpenAI's form: a list, or an object with ``messages``.

    Raises:
        ConfigError: the file is no such JSON, or a message is wrong.
    """
    from mtnlg.config import ConfigError

    file = Path(path).expanduser()
    try:
        return messages_in(json.loads(file.read_text(encoding="utf-8-sig")))
    except RecursionError as error:
        raise ConfigError(f"{file} is no saved conversation: it is nested too deeply.") from error
    except ValueError as error:
        raise ConfigError(f"{file} is no saved conversation: {error}") from error


def messages_in(content: Any) -> list[dict[str, Any]]:
    """The messages of a decoded JSON text.

    Raises:
        ConfigError: there are none, or one is wrong.
    """
    from mtnlg.config import ConfigError
    from mtnlg.generation.messages import checked_messages

    if isinstance(content, dict) and "messages" not in content:
        raise ConfigError('there are no "messages" in it.')
    return checked_messages(content["messages"] if isinstance(content, dict) else content)


def write_conversation(path: str, messages: Sequence[dict[str, Any]]) -> Path:
    """Save messages in OpenAI's form; a file is replaced only once the new one is whole."""
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=2)
    new = file.with_name(f".{file.name}.new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(file)
    return file


def read_text(path: str) -> str:
    """The text of a file that the person names.

    Raises:
        ConfigError: it holds no text, or none in UTF-8.
    """
    from mtnlg.config import ConfigError

    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}.") from error
    if not text.strip():
        raise ConfigError(f"{file} is empty.")
    return text


def read_template(name_or_file: str | None) -> str | None:
    """A chat template file's content, or the name as it is.

    Raises:
        ConfigError: it looks like a file and is not there.
    """
    from mtnlg.config import ConfigError

    if name_or_file is None:
        return None
    if Path(name_or_file).is_file():
        return Path(name_or_file).read_text(encoding="utf-8")
    if name_or_file.endswith((".jinja", ".jinja2", ".j2")) or os.sep in name_or_file:
        raise ConfigError(f"--chat-template {name_or_file}: there is no such file.")
    return name_or_file


def history_file() -> Path:
    """Where what was typed is remembered: the user's state folder (``XDG_STATE_HOME``)."""
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "mtnlg" / "chat_history"
