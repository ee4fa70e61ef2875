"""What a chat request may hold."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from mtnlg.serving.schemas import MAX_TOP_LOGPROBS, Sampling, Strict, one_of

# What a server once sent may come back with a message: refusal, annotations, index of a call, ...
SENT_BACK = ConfigDict(strict=True, extra="ignore")


class TextPart(Strict):
    """A piece of a message's content. This server reads text only."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[TextPart],
    one_of("a string or an array of parts of type 'text' (this model reads text only)"),
]


class FunctionCall(Strict):
    """What a tool call calls."""

    model_config = SENT_BACK

    name: str
    arguments: str = Field(description="JSON")


class ToolCall(Strict):
    """A call of a tool that the assistant made."""

    model_config = SENT_BACK

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """A turn of the conversation."""

    model_config = SENT_BACK

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Strict):
    """What a tool is."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """The schema that the answer follows."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    one_of("'none', 'auto', 'required' or an object that names a function"),
]


class ChatRequest(Sampling):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = Field(None, description="Read and ignored.")
    verbosity: str | None = Field(None, description="Read and ignored.")
    context_policy: Literal["refuse", "drop", "summarise"] | None = Field(
        None,
        description="What becomes of the oldest turns where the conversation is longer than the context: "
        "refuse (the default), drop, or summarise them.",
    )
    continue_final_message: bool | None = Field(
        None, description="The last message is the beginning of the answer; the answer is its rest."
    )
    add_generation_prompt: bool | None = Field(
        None, description="false with continue_final_message; nothing else is to be chosen."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the template.")
