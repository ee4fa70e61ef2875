"""Calls of tools: asked for by the template, found again in what the model writes.

Two forms are read: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen, our own
template) anywhere in an answer, and an answer that is nothing but such an object (Llama 3, which calls
the arguments ``parameters``).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtnlg.serving.chat_schemas import NamedTool, Tool
from mtnlg.serving.errors import invalid

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# As Python's json writes, which is how templates show calls to a model; none to run on for ever.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Call:
    """A call that was found.

    Args:
        name: of the function.
        arguments: JSON text.
    """

    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """As an answer holds it, with an id of its own."""
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class ToolReader:
    """Parts the calls from the text of one answer, while it grows.

    Args:
        names: of the tools there are; whatever else looks like a call is text.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.num_calls = 0
        self._names = frozenset(names)
        self._held = ""  # may be the beginning of a call
        self._is_inside = False
        self._is_start = True  # neither text nor a call so far
        self._has_text = False  # since the last call

    def push(self, text: str) -> list[str | Call]:
        """Take more text; give what is certain, in order."""
        self._held += text
        found: list[str | Call] = []
        while True:
            if self._is_inside:
                inside, mark, rest = self._held.partition(CLOSE)
                if not mark:
                    return found
                call = self._call(inside)
                if call is None:
                    self._add(found, f"{OPEN}{inside}{CLOSE}")
                else:
                    found.append(call)
                self._held, self._is_inside = rest, False
                continue
            if not self._has_text and not self._held.strip():
                return found  # white space around calls is no text
            if self._is_start and self._held.lstrip().startswith("{"):
                return found  # known at the end
            before, mark, rest = self._held.partition(OPEN)
            if mark:
                self._add(found, before)
                self._held, self._is_inside = rest, True
                continue
            cut = len(self._held) - _num_of_beginning(self._held, OPEN)
            if not self._has_text and not self._held[:cut].strip():
                return found
            self._add(found, self._held[:cut])
            self._held = self._held[cut:]
            return found

    def finish(self) -> list[str | Call]:
        """What is left at the end of the answer."""
        held, self._held = self._held, ""
        if self._is_inside:
            return [self._call(held) or OPEN + held]
        if self._is_start and (call := self._call(held)):
            return [call]
        is_text = held.strip() or self._has_text or not self.num_calls
        return [held] if held and is_text else []

    def _add(self, found: list[str | Call], text: str) -> None:
        if text.strip() or (text and self._has_text):
            self._is_start, self._has_text = False, True
            found.append(text)

    def _call(self, text: str) -> Call | None:
        try:
            content = json.loads(text)
        except ValueError:
            return None
        if not isinstance(content, dict) or content.get("name") not in self._names:
            return None
        arguments = content.get("arguments", content.get("parameters", {}))
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.num_calls += 1
        self._is_start = self._has_text = False
        return Call(content["name"], arguments)


def _num_of_beginning(text: str, mark: str) -> int:
    """Letters at the end of ``text`` that ``mark`` may begin with."""
    for count in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-count:]):
            return count
    return 0


def chosen_tools(tools: Sequence[Tool] | None, choice: Any) -> tuple[list[Tool], bool]:
    """The tools that may be called, and whether one must be.

    Raises:
        ApiError: 400: a choice without tools, or of one that is not there.
    """
    tools = list(tools or ())
    if not tools:
        if choice not in (None, "none"):
            message = (
                "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified."
            )
            raise invalid(message, "tool_choice", "invalid_value")
        return [], False
    if choice == "none":
        return [], False
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            message = f"Tool choice '{choice.function.name}' not found in 'tools' parameter."
            raise invalid(message, "tool_choice", "invalid_value")
        return named, True
    return tools, choice == "required"


def call_grammar(tools: Sequence[Tool]) -> str:
    """A grammar, in Lark's notation, of exactly one call of one of the tools."""
    schemas = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": SPACES,
        }
        for tool in tools
    ]
    rules = [f"call_{number}: %json {json.dumps(schema)}" for number, schema in enumerate(schemas)]
    calls = " | ".join(f"call_{number}" for number in range(len(schemas)))
    return "\n".join([f'start: "{OPEN}" call "{CLOSE}"', f"call: {calls}", *rules])
