"""``POST /v1/chat/completions``: the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from mtnlg.generation.constraint import Constraint
from mtnlg.serving.chat_answer import ChatAnswer
from mtnlg.serving.chat_schemas import ChatRequest, Tool
from mtnlg.serving.conversation import Conversation, prompt_in_window, prompt_of
from mtnlg.serving.errors import invalid
from mtnlg.serving.jobs import Job
from mtnlg.serving.prompts import (
    base_request,
    check_count,
    check_lengths,
    compiled,
    constraint_of,
    sequences,
)
from mtnlg.serving.state import ServerState, state_of, visit_of
from mtnlg.serving.streaming import EventStream, finish
from mtnlg.serving.tools import CLOSE, call_grammar, chosen_tools


async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    state, visit = state_of(request), visit_of(request)
    adapter = state.chosen_adapter(body.model)
    _check(body)
    tools, must_call = chosen_tools(body.tools, body.tool_choice)
    check_count(state, body.n or 1, "n")
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    is_open = body.continue_final_message is True
    conversation = Conversation(body.messages, tools, body.chat_template_kwargs or {}, wanted, is_open)
    notices: list[str] = []
    if body.context_policy in ("drop", "summarise"):
        prompt, notices = await prompt_in_window(state, visit, conversation, body, adapter)
    else:
        prompt = await prompt_of(state, conversation)
    ids = prompt.ids
    check_lengths(state, [ids], wanted or 1, "messages", adapter)
    base = base_request(state, visit, body, adapter)
    base.end_ids = () if body.ignore_eos else prompt.end_ids
    one_call = [CLOSE] if tools and body.parallel_tool_calls is False else []
    base.stop = [*base.stop, *prompt.stop, *one_call]
    base.constraint = await _constraint(state, body, tools if must_call else [])
    taken = 1 if state.backend.reads_source else len(ids)
    base.max_new_tokens = wanted or state.longest(adapter) - taken
    base.min_new_tokens = min(base.min_new_tokens, base.max_new_tokens)
    base.logprobs = (body.top_logprobs or 0) if body.logprobs else None
    job = Job(state, visit, sequences(base, [ids], body.n or 1), is_open_ended=wanted is None)
    answer = ChatAnswer(state, body, job, [tool.function.name for tool in tools], prompt.format)
    headers = {"x-context-notice": " ".join(notices)} if notices else {}
    if body.stream:
        return EventStream(job, visit, answer, headers)
    await finish(request, job)
    if state.config.log_prompts:
        messages = [message.model_dump(exclude_none=True) for message in body.messages]
        visit.facts |= {"messages": messages, "answer": [found.text for found in job.generations]}
    return JSONResponse(answer.whole(), headers=headers)


def _check(body: ChatRequest) -> None:
    """Refuse what does not go together."""
    if body.stream_options is not None and not body.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise invalid(message, "stream_options", "invalid_value")
    if body.top_logprobs is not None and not body.logprobs:
        message = "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled."
        raise invalid(message, "top_logprobs", "invalid_value")
    _check_open(body)
    for number, turn in enumerate(body.messages):
        where = f"messages[{number}]"
        if turn.content is None and not (turn.role == "assistant" and turn.tool_calls):
            text = f"Invalid value for '{where}.content': expected a string, got null."
            raise invalid(text, f"{where}.content", "invalid_type")
        if turn.role == "tool" and turn.tool_call_id is None:
            text = f"Missing required parameter: '{where}.tool_call_id'."
            raise invalid(text, f"{where}.tool_call_id", "missing_required_parameter")


def _check_open(body: ChatRequest) -> None:
    """Refuse to go on with what is no beginning of an answer."""
    last = body.messages[-1]
    if not body.continue_final_message:
        if body.add_generation_prompt is False:
            message = "'add_generation_prompt' may be false only together with 'continue_final_message'."
            raise invalid(message, "add_generation_prompt", "invalid_value")
        return
    if body.add_generation_prompt:
        message = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise invalid(message, "add_generation_prompt", "invalid_value")
    if last.role != "assistant" or not last.content or last.tool_calls:
        message = "'continue_final_message' needs a last message of the assistant, with text and no calls."
        raise invalid(message, "messages", "invalid_value")


async def _constraint(state: ServerState, body: ChatRequest, called: Sequence[Tool]) -> Constraint | None:
    """The one rule that the answer follows, from whichever field asks for it.

    Raises:
        ApiError: 400: two rules, or one that cannot be used.
    """
    found = await constraint_of(state, body)
    form = body.response_format
    has_form = form is not None and form.type != "text"
    if sum((found is not None, has_form, bool(called))) > 1:
        message = "Give one of 'response_format', a 'guided_*' rule and a 'tool_choice' that forces a call."
        raise invalid(message, "response_format", "invalid_value")
    if called:
        return await compiled(state, "grammar", call_grammar(called), "tools")
    if form is None or not has_form:
        return found
    if form.type == "json_object":
        return await compiled(state, "json_object", None, "response_format")
    where = "response_format.json_schema"
    if form.json_schema is None or form.json_schema.schema_ is None:
        missing = where if form.json_schema is None else f"{where}.schema"
        raise invalid(f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")
    return await compiled(state, "json_schema", form.json_schema.schema_, f"{where}.schema")
