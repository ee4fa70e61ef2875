"""What the OpenAPI description says of each path, and the shape of its answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from mtnlg.serving.chat_schemas import ChatRequest
from mtnlg.serving.schemas import (
    AdapterRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)

ABOUT = "OpenAI's API for a model of one's own, with fields beside it for every rule the engine knows."

FIELDS = sorted(
    name
    for model in (
        CompletionRequest,
        ChatRequest,
        EmbeddingRequest,
        TokenizeRequest,
        DetokenizeRequest,
        AdapterRequest,
    )
    for name in model.model_fields
)


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """The answer when something is wrong."""

    error: ErrorBody


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class LegacyLogprobs(BaseModel):
    """How likely tokens were, in parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: str


class _Headed(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class Completion(_Headed):
    """Answer of ``/v1/completions``."""

    choices: list[CompletionChoice]
    usage: Usage


class Alternative(BaseModel):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(Alternative):
    """A chosen token with its alternatives."""

    top_logprobs: list[Alternative]


class ChatLogprobs(BaseModel):
    """How likely the tokens of an answer were."""

    content: list[ChatToken]
    refusal: None


class AssistantMessage(BaseModel):
    """The assistant's turn."""

    role: str
    content: str | None
    refusal: None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(_Headed):
    """Answer of ``/v1/chat/completions``."""

    choices: list[ChatChoice]
    usage: Usage


class Embedding(BaseModel):
    """One vector: numbers, or the base64 of little-endian float32."""

    object: str
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """What embeddings took."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Answer of ``/v1/embeddings``."""

    object: str
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(BaseModel):
    """Answer of ``/v1/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """Answer of ``/v1/detokenize``."""

    prompt: str


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: str
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int
    has_chat_template: bool


class Models(BaseModel):
    """Answer of ``/v1/models``."""

    object: str
    data: list[Model]


class Deleted(BaseModel):
    """A model that is no longer there."""

    id: str
    object: str
    deleted: bool


class Status(BaseModel):
    """How the server is."""

    status: str


_ANSWERS: dict[str, type[BaseModel] | None] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/v1/embeddings": Embeddings,
    "/v1/tokenize": Tokens,
    "/v1/detokenize": Text,
    "/v1/adapters": Model,
    "/v1/adapters/{name}": Deleted,
    "/v1/models": Models,
    "/v1/models/{model:path}": Model,
    "/health": Status,
    "/ready": Status,
}
_STREAMED = ("/v1/completions", "/v1/chat/completions")
_WORKING = {
    400: "Something in the request is wrong",
    401: "No key, or a wrong one",
    403: "Adapters cannot be changed here",
    404: "No such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is no JSON",
    429: "Too much at once; Retry-After says when to come again",
    500: "A fault of the server",
    503: "Not ready; Retry-After says when to come again",
    504: "The time was over before the first token",
}
_LOOKING = {401: _WORKING[401], 503: _WORKING[503]}


def of(path: str) -> dict[str, Any]:
    """Keyword arguments of the route."""
    answer = _ANSWERS.get(path)
    responses: dict[int | str, dict[str, Any]] = {200: {"description": "The answer"}}
    if answer is not None:
        responses[200]["model"] = answer
    else:
        responses[200]["content"] = {"text/plain" if path == "/metrics" else "application/json": {}}
    if path in _STREAMED:
        responses[200]["content"] = {"text/event-stream": {}}
    if path in ("/health", "/ready"):
        responses[503] = {"description": "It is not", "model": Status}
    elif path != "/metrics":
        is_working = path.startswith("/v1/") and "models" not in path
        known = _WORKING if is_working else _LOOKING
        if path == "/v1/models/{model:path}":
            known = {**known, 404: _WORKING[404]}
        responses |= {status: {"description": text, "model": Error} for status, text in known.items()}
        responses["default"] = {"description": "Anything else", "model": Error}
    return {"responses": responses, "response_model": None}
