"""The conversation of a chat request as the model reads it: whole, or what there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.generation.dialogue_format import DialoguePrompt, PersonaFormat, dialogue_prompt
from mtnlg.generation.dialogue_ids import DialogueIds
from mtnlg.generation.dialogue_window import DialogueWindow, stable_start, turns_of
from mtnlg.generation.messages import call_arguments, checked_messages
from mtnlg.generation.request import GenerationRequest
from mtnlg.serving.chat_schemas import ChatRequest, Message, Tool, ToolCall
from mtnlg.serving.errors import ApiError, invalid
from mtnlg.serving.prompts import base_request, off_the_loop
from mtnlg.serving.state import ServerState, Visit

# What the template gets from the server and nobody may override.
RESERVED = frozenset(
    ("tokenizer", "messages", "tools", "form", "max_tokens", "is_open", "add_generation_prompt")
)
MOST_SUMMARISED = 8  # times the context: what is longer is not read for a summary


@dataclass(frozen=True)
class Conversation:
    """What is to be answered.

    Args:
        messages: of the request.
        tools: that may be called.
        variables: for the template.
        wanted: tokens that the answer needs room for.
        is_open: the last message is the beginning of the answer.
    """

    messages: Sequence[Message]
    tools: Sequence[Tool] = ()
    variables: dict[str, Any] | None = None
    wanted: int | None = None
    is_open: bool = False

    @property
    def plain(self) -> list[dict[str, Any]]:
        """Messages as templates know them."""
        return [as_template_message(message) for message in self.messages]

    @property
    def described_tools(self) -> list[dict[str, Any]] | None:
        """Tools as templates know them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools] or None

    def checked_variables(self) -> dict[str, Any]:
        """Variables, none of which is the server's own."""
        variables = self.variables or {}
        if taken := RESERVED & variables.keys():
            message = f"Invalid 'chat_template_kwargs': {min(taken)} is set by the server."
            raise invalid(message, "chat_template_kwargs", "invalid_value")
        return variables


async def prompt_of(state: ServerState, conversation: Conversation) -> DialoguePrompt:
    """The whole conversation.

    Raises:
        ApiError: 400: too long, or the template refuses it.
    """
    backend, plain = state.backend, conversation.plain
    limit = backend.engine.max_length
    least = _least_tokens(state, plain)
    if least > limit:
        raise _too_long(limit, least)
    variables, described = conversation.checked_variables(), conversation.described_tools
    room = max(1, limit - (conversation.wanted or limit // 4))
    try:
        return await off_the_loop(
            state,
            lambda: dialogue_prompt(
                backend.tokenizer,
                plain,
                described,
                form=backend.form,
                max_tokens=room,
                is_open=conversation.is_open,
                **variables,
            ),
        )
    except (ConfigError, DataError, RecursionError) as error:
        raise _refused(state, conversation, error) from error


async def prompt_in_window(
    state: ServerState,
    visit: Visit,
    conversation: Conversation,
    body: ChatRequest,
    adapter: LoadedAdapter | None,
) -> tuple[DialoguePrompt, list[str]]:
    """The conversation without the oldest turns, where it is too long, and what was left out.

    What the model reads and writes for a summary counts as the caller's.

    Raises:
        ApiError: 400: the last turn alone is too long, or the template refuses it; 429: a summary was
            more than the caller may have.
    """
    backend, limit = state.backend, state.longest(adapter)
    policy = body.context_policy or "refuse"
    variables, described = conversation.checked_variables(), conversation.described_tools
    base = base_request(state, visit, body, adapter)
    spent: list[int] = []

    def summarise(ids: list[int], count: int) -> str:
        form = backend.form
        request = GenerationRequest(
            ids,
            max_new_tokens=count,
            end_ids=form.end_ids,
            stop=form.stop,
            deadline_seconds=base.deadline_seconds,
            adapter=base.adapter,
        )
        generation = backend.engine.submit(request).result()
        spent.append(len(ids) + generation.usage.new_tokens)
        return form.content_of(generation.text).strip()

    def write() -> tuple[DialoguePrompt, list[str]]:
        messages = _shortened(state, checked_messages(conversation.plain), limit, policy)
        form = backend.form
        if conversation.tools and not form.can_use_tools:
            raise ConfigError("tools need a chat template, and this model has none.")
        if isinstance(form, PersonaFormat):
            form = form.fixed(messages)
        window = DialogueWindow(form, DialogueIds(backend.tokenizer, form), limit)
        wanted = conversation.wanted or limit // 4
        if policy == "drop":
            window.replay(messages, wanted)
        is_open = conversation.is_open
        found = window.prompt(messages, wanted, policy, summarise, described, variables, is_open)
        return DialoguePrompt(found.ids, form.end_ids, form.stop, form), found.notices

    try:
        found = await off_the_loop(state, write, is_slow=True)
    except (ConfigError, DataError, RecursionError) as error:
        raise _refused(state, conversation, error) from error
    if spent:
        visit.caller.charge(sum(spent))
    return found


def _shortened(
    state: ServerState, messages: list[dict[str, Any]], limit: int, policy: str
) -> list[dict[str, Any]]:
    """Without turns that are certainly too much: told by their letters, before anything is tokenized."""
    most = limit * (MOST_SUMMARISED if policy == "summarise" else 2)
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns = turns_of(messages[len(head) :])
    sizes = [_least_tokens(state, turn) for turn in turns]
    start = stable_start([_least_tokens(state, turn[:1]) for turn in turns], sizes, most)
    if sum(sizes[start:]) > most:
        raise _too_long(limit, sum(sizes[start:]))
    return [*head, *(dict(message) for turn in turns[start:] for message in turn)]


def _least_tokens(state: ServerState, messages: Sequence[Mapping[str, Any]]) -> int:
    """Messages have at least so many tokens: told without writing them out; each says who speaks."""
    return sum(max(1, state.backend.least_tokens(str(message["content"]))) for message in messages)


def _too_long(limit: int, least: int) -> ApiError:
    return invalid(
        f"This model's maximum context length is {limit} tokens. However, your messages resulted in "
        f"at least {least}. Please reduce the length of the messages.",
        "messages",
        "context_length_exceeded",
    )


def _refused(state: ServerState, conversation: Conversation, error: Exception) -> ApiError:
    param = "tools" if conversation.tools and not state.backend.form.can_use_tools else "messages"
    return invalid(f"Invalid '{param}': {error}", param, "invalid_value")


def as_template_message(message: Message) -> dict[str, Any]:
    """A message as templates know it: plain text, arguments of calls as objects."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    found: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return found


def _template_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call_arguments(call.function.arguments)}
    return {"id": call.id, "type": "function", "function": function}
