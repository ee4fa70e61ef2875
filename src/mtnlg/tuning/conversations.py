"""Chat data of all usual forms as conversations in one form: OpenAI's messages.

====================  ============================================================================
``messages``          ``{"messages": [{"role": "user", "content": ...}, ...]}`` (tools too)
``sharegpt``          ``{"conversations": [{"from": "human", "value": ...}, ...]}``
``instruction``       ``{"instruction": ..., "input": ..., "output": ...}`` (Alpaca's)
``completion``        ``{"prompt": ..., "completion": ...}``: text to go on with, no chat
``kdconv``            ``{"messages": [{"message": ...}, ...]}``: two people in turn
====================  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtnlg.config import ConfigError, DataError
from mtnlg.generation.messages import checked_messages
from mtnlg.tuning.records import Record, read_records

MOST_PROBLEMS = 10  # named in one error
_ROLES_OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """What one record says.

    Args:
        messages: in OpenAI's form, checked; the last one is the assistant's.
        where: file and line.
        tools: JSON schemas of functions.
        is_plain: prompt and completion as they stand, without a template.
    """

    messages: list[dict[str, Any]]
    where: str
    tools: list[dict[str, Any]] | None = None
    is_plain: bool = False


class RecordError(Exception):
    """What is wrong with one record; the caller knows where it stands."""


def read_conversations(
    sources: Sequence[str], form: str = "auto", system: str | None = None, max_turns: int | None = None
) -> list[Conversation]:
    """All conversations of some files.

    Args:
        sources: files, folders or patterns.
        form: one of the table above, or ``auto`` to see from each record.
        system: system message of conversations that have none; not of plain completions.
        max_turns: longer dialogues become parts of so many messages.

    Raises:
        DataError: naming the file and line of each record with wrong roles, empty answers, missing
            fields, or of no known form; or there is no conversation at all.
    """
    found: list[Conversation] = []
    problems: list[str] = []
    for record in read_records(sources):
        try:
            conversation = conversation_of(record, form)
        except RecordError as error:
            problems.append(f"{record.where}: {error}")
            continue
        found += _parts(conversation, max_turns)
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:MOST_PROBLEMS])
        more = f"\n  and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise DataError(f"{len(problems)} records cannot be learnt from:\n{shown}{more}")
    if not found:
        raise DataError(f"{', '.join(sources)}: there is no conversation.")
    return [_with_system(conversation, system) for conversation in found]


def conversation_of(record: Record, form: str = "auto") -> Conversation:
    """One record as a conversation.

    Raises:
        RecordError: what is wrong with it.
    """
    if not isinstance(record.value, dict):
        raise RecordError(f"the record is a {type(record.value).__name__}: expected an object.")
    name = form_of(record.value) if form == "auto" else form
    conversation = _READERS[name](record.value, record.where)
    if not conversation.is_plain:
        _check_turns(conversation.messages)
    return conversation


def form_of(value: Mapping[str, Any]) -> str:
    """Which form a record has.

    Raises:
        RecordError: none that is known.
    """
    messages = value.get("messages")
    if isinstance(messages, list):
        first = messages[0] if messages else None
        is_kdconv = isinstance(first, dict) and "message" in first and "role" not in first
        return "kdconv" if is_kdconv else "messages"
    for key, name in (
        ("conversations", "sharegpt"),
        ("instruction", "instruction"),
        ("prompt", "completion"),
    ):
        if key in value:
            return name
    fields = ", ".join(list(value)[:8]) or "none"
    raise RecordError(
        f"its fields ({fields}) are of no known form: expected messages, conversations, instruction and "
        "output, or prompt and completion."
    )


def _messages(value: Mapping[str, Any], where: str) -> Conversation:
    tools = value.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise RecordError("tools must be a list of JSON schemas.")
    return Conversation(_checked(_list_of(value, "messages")), where, tools or None)


def _sharegpt(value: Mapping[str, Any], where: str) -> Conversation:
    messages = []
    for number, turn in enumerate(_list_of(value, "conversations")):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in _ROLES_OF_SHAREGPT:
            known = ", ".join(sorted(_ROLES_OF_SHAREGPT))
            raise RecordError(f"conversations[{number}].from is {speaker!r}: choose one of {known}.")
        messages.append({"role": _ROLES_OF_SHAREGPT[speaker], "content": turn.get("value")})
    system = value.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(_checked(messages), where)


def _instruction(value: Mapping[str, Any], where: str) -> Conversation:
    instruction, more = _text(value, "instruction"), value.get("input")
    if more is not None and not isinstance(more, str):
        raise RecordError(f"input is a {type(more).__name__}: expected a text.")
    question = f"{instruction}\n\n{more}" if more else instruction
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(value, "output")},
    ]
    system = value.get("system")
    head = [{"role": "system", "content": system}] if isinstance(system, str) and system else []
    return Conversation(_checked([*head, *messages]), where)


def _completion(value: Mapping[str, Any], where: str) -> Conversation:
    prompt, completion = value.get("prompt"), _text(value, "completion")
    if not isinstance(prompt, str):
        raise RecordError(f"prompt is {_shown(prompt)}: expected a text.")
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return Conversation(_checked(messages), where, is_plain=True)


def _kdconv(value: Mapping[str, Any], where: str) -> Conversation:
    messages = []
    for number, turn in enumerate(_list_of(value, "messages")):
        if not isinstance(turn, dict) or not isinstance(turn.get("message"), str):
            raise RecordError(f"messages[{number}] has no text under message.")
        messages.append({"role": ("user", "assistant")[number % 2], "content": turn["message"]})
    if len(messages) % 2:  # the last word is the other person's: there is no answer to learn
        messages.pop()
    return Conversation(_checked(messages), where)


_READERS: dict[str, Callable[[Mapping[str, Any], str], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "instruction": _instruction,
    "completion": _completion,
    "kdconv": _kdconv,
}


def _checked(messages: Any) -> list[dict[str, Any]]:
    try:
        return checked_messages(messages)
    except ConfigError as error:
        raise RecordError("; ".join(error.problems)) from error


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    """Roles that make a conversation, and answers that say something."""
    problems = []
    before = None
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "system" and number:
            problems.append(f"messages[{number}] is a system message: only the first one may be.")
        if role in ("user", "assistant") and role == before:
            problems.append(f"messages[{number}] is the {role}'s, like the one before it.")
        if role == "assistant" and before in (None, "system"):
            problems.append(f"messages[{number}] answers nothing: a user's message must come first.")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            problems.append(f"messages[{number}] is an empty answer.")
        before = role
    if before != "assistant":
        problems.append("the last message is not the assistant's: there is no answer to learn.")
    if problems:
        raise RecordError(" ".join(problems))


def _parts(conversation: Conversation, max_turns: int | None) -> Iterator[Conversation]:
    """A dialogue in parts that each end with an answer."""
    head = [m for m in conversation.messages[:1] if m["role"] == "system"]
    turns = conversation.messages[len(head) :]
    if max_turns is None or len(turns) <= max_turns or conversation.is_plain:
        yield conversation
        return
    part: list[dict[str, Any]] = []
    for exchange in exchanges(turns):
        if part and len(part) + len(exchange) > max_turns:
            yield Conversation([*head, *part], conversation.where, conversation.tools)
            part = []
        part += exchange
    if part:
        yield Conversation([*head, *part], conversation.where, conversation.tools)


def exchanges(turns: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A question and everything up to the next one, again and again."""
    part: list[dict[str, Any]] = []
    for message in turns:
        if message["role"] == "user" and part:
            yield part
            part = []
        part.append(message)
    if part:
        yield part


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if not system or conversation.is_plain or conversation.messages[0]["role"] == "system":
        return conversation
    messages = [{"role": "system", "content": system}, *conversation.messages]
    return Conversation(messages, conversation.where, conversation.tools)


def _list_of(value: Mapping[str, Any], key: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or not found:
        raise RecordError(f"{key} is {_shown(found)}: expected a list of turns.")
    return found


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found.strip():
        raise RecordError(f"{key} is {_shown(found)}: expected a text.")
    return found


def _shown(value: Any) -> str:
    if value in (None, "", []):
        return "missing" if value is None else "empty"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
