"""Messages of a conversation in OpenAI's form: checked, and made simple enough for any template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mtnlg.config.errors import ConfigError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Messages: TypeAlias = Sequence[Mapping[str, Any]]


def checked_messages(messages: Messages) -> list[dict[str, Any]]:
    """A copy with plain texts as contents; what templates do not know is turned into what they know.

    ``developer`` becomes ``system``; a content in parts becomes one text, its parts on lines of their own;
    a tool call's arguments, a JSON text in OpenAI's form, become the object that templates expect, or stay
    text where they are no JSON.

    Raises:
        ConfigError: naming every message that is wrong, and how.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise ConfigError("messages must be a list of objects with role and content.")
    if not messages:
        raise ConfigError("messages is empty: give at least one message.")
    problems: list[str] = []
    checked = [_checked(f"messages[{number}]", one, problems) for number, one in enumerate(messages)]
    if problems:
        raise ConfigError(problems)
    return checked


def _checked(where: str, message: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        problems.append(f"{where} is a {type(message).__name__}: give an object with role and content.")
        return {}
    found = {key: value for key, value in message.items() if value is not None}
    role = found.get("role")
    if role not in ROLES:
        problems.append(f"{where}.role is {role!r}: choose one of {', '.join(ROLES)}.")
    if role == "developer":
        found["role"] = "system"
    calls = found.get("tool_calls")
    if calls is not None:
        found["tool_calls"] = _checked_calls(f"{where}.tool_calls", calls, problems)
    if "content" not in found and not (role == "assistant" and calls):
        problems.append(f"{where}.content is missing: give a text.")
    found["content"] = _text_of(f"{where}.content", found.get("content", ""), problems)
    return found


def _text_of(where: str, content: Any, problems: list[str]) -> str:
    if isinstance(content, str):
        if any("\ud800" <= letter <= "\udfff" for letter in content):
            problems.append(f"{where} is not valid Unicode: it holds half of a surrogate pair.")
        return content
    if not isinstance(content, Sequence):
        problems.append(f"{where} is a {type(content).__name__}: give a text or a list of text parts.")
        return ""
    texts = []
    for number, part in enumerate(content):
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text", "refusal"):
            text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            problems.append(f"{where}[{number}] is of the type {kind!r}: only text can be read here.")
        else:
            texts.append(text)
    return "\n".join(texts)


def _checked_calls(where: str, calls: Any, problems: list[str]) -> list[dict[str, Any]]:
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        problems.append(f"{where} is a {type(calls).__name__}: give a list of calls.")
        return []
    return [_checked_call(f"{where}[{number}]", call, problems) for number, call in enumerate(calls)]


def _checked_call(where: str, call: Any, problems: list[str]) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        problems.append(f"{where} has no function with a name.")
        return {}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = call_arguments(arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def call_arguments(text: str) -> Any:
    """The arguments of a call; what is no JSON stays text: a model may be shown what it wrote wrong."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
