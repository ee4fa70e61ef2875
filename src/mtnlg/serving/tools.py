"""Calls of tools: asked for by the template, found again in what the model writes.

Two forms are read: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (Hermes, Qwen, our own
template) anywhere in an answer, and an answer that is nothing but such an object (Llama 3, which calls
the arguments ``parameters``).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mtnlg.serving.chat_schemas import NamedTool, Tool
from mtnlg.serving.errors import invalid

OPEN, CLOSE = "<tool_call>", "</tool_call>"
# As Python's json writes, which is how templates show calls to a model; none to run on for ever.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


# How nearly every model begins a call: from there on its arguments can be handed on as they come.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class Call:
    """A call that was found, or the beginning of one.

    Args:
        name: of the function.
        arguments: JSON text; of one whose arguments still come, none of them.
    """

    name: str
    arguments: str = ""

    def as_json(self) -> dict[str, Any]:
        """As an answer holds it, with an id of its own."""
        return {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(frozen=True)
class Piece:
    """More of the arguments of the last call, as the model writes them.

    Args:
        text: of JSON.
    """

    text: str


Part = str | Call | Piece


def joined(parts: Sequence[Part]) -> list[str | Call]:
    """Texts and whole calls."""
    found: list[str | Call] = []
    for part in parts:
        if isinstance(part, Piece):
            last = found.pop()
            assert isinstance(last, Call)
            part = replace(last, arguments=last.arguments + part.text)
        found.append(part)
    return found


class _Object:
    """Finds the end of one JSON object while its text comes."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = self._is_escaped = False

    def end_in(self, text: str) -> int | None:
        """Letters of ``text`` up to the object's end, if it is there."""
        for place, letter in enumerate(text, start=1):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_text:
                self._is_escaped, self._is_in_text = letter == "\\", letter != '"'
            elif letter == '"':
                self._is_in_text = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place
        return None


class ToolReader:
    """Parts the calls from the text of one answer, while it grows.

    A call that names a known tool first is handed on from there, its arguments as they come, also if they
    turn out to be no JSON or end too early, as with OpenAI. Any other is handed on when it is whole.

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
        self._arguments: _Object | None = None  # of the call that is being handed on
        self._is_past = False  # its arguments are over, its end is not

    def push(self, text: str) -> list[Part]:
        """Take more text; give what is certain, in order."""
        self._held += text
        found: list[Part] = []
        while self._go_on(found):
            continue
        return found

    def _go_on(self, found: list[Part]) -> bool:
        """Take the next thing out of what is held; whether there may be more."""
        if self._arguments is not None:
            return self._hand_on(found, self._arguments)
        if self._is_past:
            return self._end_call()
        if self._is_inside or (self._is_start and self._held.lstrip().startswith("{")):
            return self._begin_call(found) or (self._is_inside and self._take_whole(found))
        if not self._has_text and not self._held.strip():
            return False  # white space around calls is no text
        before, mark, rest = self._held.partition(OPEN)
        if mark:
            self._add(found, before)
            self._held, self._is_inside = rest, True
            return True
        cut = len(self._held) - _num_of_beginning(self._held, OPEN)
        if self._has_text or self._held[:cut].strip():
            self._add(found, self._held[:cut])
            self._held = self._held[cut:]
        return False

    def _begin_call(self, found: list[Part]) -> bool:
        head = _HEAD.match(self._held)
        if head is None or head[1] not in self._names:
            return False
        found.append(Call(head[1]))
        self.num_calls += 1
        self._is_start = self._has_text = False
        self._held, self._arguments = self._held[head.end() :], _Object()
        return True

    def _hand_on(self, found: list[Part], arguments: _Object) -> bool:
        if not self._held:
            return False
        end = arguments.end_in(self._held)
        found.append(Piece(self._held[:end]))
        if end is None:
            self._held = ""
            return False
        self._held, self._arguments, self._is_past = self._held[end:], None, True
        return True

    def _end_call(self) -> bool:
        """Leave out what closes the call."""
        mark = CLOSE if self._is_inside else "}"
        _, found, rest = self._held.partition(mark)
        if not found:
            return False
        self._held, self._is_past, self._is_inside = rest, False, False
        return True

    def _take_whole(self, found: list[Part]) -> bool:
        inside, mark, rest = self._held.partition(CLOSE)
        if not mark:
            return False
        call = self._call(inside)
        if call is None:
            self._add(found, f"{OPEN}{inside}{CLOSE}")
        else:
            found.append(call)
        self._held, self._is_inside = rest, False
        return True

    def finish(self) -> list[Part]:
        """What is left at the end of the answer."""
        held, self._held = self._held, ""
        if self._is_past:
            return []
        if self._is_inside:
            return [] if self._arguments else [self._call(held) or OPEN + held]
        if self._is_start and (call := self._call(held)):
            return [call]
        is_text = held.strip() or self._has_text or not self.num_calls
        return [held] if held and is_text else []

    def _add(self, found: list[Part], text: str) -> None:
        if text.strip() or (text and self._has_text):
            self._is_start, self._has_text = False, True
            found.append(text)

    def _call(self, text: str) -> Call | None:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
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
