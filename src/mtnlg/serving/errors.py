"""What is answered when something is wrong: OpenAI's error objects and status codes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"


# Of OpenAI's API, what clients ask for and what there is in its place.
ELSEWHERE = {
    "/v1/responses": "/v1/chat/completions (chat.completions of the client)",
    "/responses": "/v1/chat/completions (chat.completions of the client; its base_url ends with /v1)",
}
# Their fields of before: what has replaced them.
REPLACED = {"functions": "tools", "function_call": "tool_choice"}
LONGEST_NAME = 100  # letters of a field's name that are told back


class ApiError(HTTPException):
    """An answer that is an error object.

    Args:
        status: HTTP status code.
        message: what is wrong and what to change.
        param: the field that is wrong.
        code: short name of what is wrong, for programs.
        kind: the object's ``type``.
        headers: further headers, such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = INVALID_REQUEST,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body, self.status_code, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be answered as it is (400)."""
    return ApiError(400, message, param=param, code=code)


def too_long(limit: int, prompt_tokens: int, wanted: int, param: str) -> ApiError:
    """Prompt and answer together are longer than the model's context (400)."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, you requested "
        f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the {param}, {wanted} in the completion). "
        f"Please reduce the length of the {param} or the completion."
    )
    return invalid(message, param, "context_length_exceeded")


def unknown_model(name: str) -> ApiError:
    """No such model here (404)."""
    message = f"The model `{name[:200]}` does not exist or you do not have access to it."
    return ApiError(404, message, param="model", code="model_not_found")


def unknown_url(method: str, path: str, known: Sequence[str] = ()) -> ApiError:
    """No such path (404).

    Args:
        method: of HTTP.
        path: asked for.
        known: paths that there are, to name one that is nearly it.
    """
    hint = ""
    if path.rstrip("/") in ELSEWHERE:
        hint = f" This server does not have it: use {ELSEWHERE[path.rstrip('/')]}."
    elif near := difflib.get_close_matches(path[:200], known, n=1, cutoff=0.7):
        hint = f" Did you mean {near[0]}?"
    return ApiError(404, f"Invalid URL ({method} {path[:200]}).{hint}", code="unknown_url")


def wrong_method(method: str, path: str, allowed: str) -> ApiError:
    """The path is there, but not for this method (405)."""
    message = f"Not allowed to {method} on {path[:200]}. (HINT: allowed is {allowed or 'nothing'}.)"
    return ApiError(405, message, code="method_not_supported", headers={"Allow": allowed})


def missing_key() -> ApiError:
    """No key where one is needed (401)."""
    message = (
        "You didn't provide an API key. You need to provide your API key in an Authorization header "
        "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
    )
    return ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def no_admin() -> ApiError:
    """Nobody may change what is served."""
    message = "Adapters are loaded and removed with an admin key, and this server has none (--admin-key)."
    return ApiError(403, message, code="no_admin_key", kind="permission_error")


def wrong_key(key: str) -> ApiError:
    """A key that is not known (401); most of it is hidden in the message."""
    shown = f"{key[:3]}***{key[-2:]}" if len(key) >= 12 else "***"
    shown = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in shown)
    message = f"Incorrect API key provided: {shown}. Ask whoever runs this server for a key."
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def unavailable(message: str, code: str, retry_after: int = 1) -> ApiError:
    """Not now (503): the model is being loaded, or the server is going down."""
    return ApiError(503, message, code=code, kind=SERVER_ERROR, headers={"Retry-After": str(retry_after)})


def queue_full(message: str, retry_after: int) -> ApiError:
    """As many requests are waiting as may (429)."""
    headers = {"Retry-After": str(retry_after)}
    return ApiError(429, message, code="engine_overloaded", kind="requests", headers=headers)


def rate_limited(message: str, kind: str, retry_after_seconds: float | None) -> ApiError:
    """A key has used up its share (429), or asks for more than its share ever is (``None`` seconds)."""
    if retry_after_seconds is None:
        headers = {"x-should-retry": "false"}  # OpenAI's clients would come again otherwise
    else:
        headers = {
            "Retry-After": str(max(1, math.ceil(retry_after_seconds))),
            "retry-after-ms": str(max(1, math.ceil(1000 * retry_after_seconds))),
        }
    return ApiError(429, message, code="rate_limit_exceeded", kind=kind, headers=headers)


def body_too_large(limit: int) -> ApiError:
    """The body has more bytes than it may (413)."""
    message = f"The body of the request is larger than {limit} bytes. Send less, or split it up."
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


def too_slow(seconds: float) -> ApiError:
    """The body did not arrive in time (408)."""
    message = f"The body of the request did not arrive within {seconds:g} seconds."
    return ApiError(408, message, code="request_timeout", headers={"Connection": "close"})


def out_of_time() -> ApiError:
    """A deadline passed before the first token (504)."""
    message = "The request's time was over before its first token. Give it more, or come back later."
    return ApiError(504, message, code="timeout", kind=SERVER_ERROR)


def failed(request_id: str = "") -> ApiError:
    """A fault of ours (500). What happened stands in the log, never in the answer."""
    where = f" (request {request_id})" if request_id else ""
    message = f"The server had an error while processing your request{where}. Sorry about that!"
    return ApiError(500, message, kind=SERVER_ERROR)


# -- what pydantic finds wrong, in OpenAI's words

_KINDS = {
    "int": "an integer",
    "float": "a decimal",
    "string": "a string",
    "bool": "a boolean",
    "list": "an array",
    "tuple": "an array",
    "dict": "an object",
    "model": "an object",
    "model_attributes": "an object",
    "none_required": "null",
}
_LIMITS = {
    "greater_than_equal": (">=", "ge", "below_min_value", "below minimum value"),
    "greater_than": (">", "gt", "below_min_value", "below minimum value"),
    "less_than_equal": ("<=", "le", "above_max_value", "above maximum value"),
    "less_than": ("<", "lt", "above_max_value", "above maximum value"),
}


def of_validation(problems: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> ApiError:
    """The first thing that is wrong with a body, as OpenAI says it.

    Args:
        problems: of ``ValidationError.errors()``.
        known: names of the fields there are, to suggest one for a misspelt one.
    """
    first = problems[0]
    path = [step for step in first["loc"] if step != "body"]
    param = _param(path)
    if not path and first["type"] in ("missing", "model_attributes_type", "model_type", "dict_type"):
        return invalid("The body of the request must be a JSON object.")
    kind = first["type"]
    if kind == "missing":
        return invalid(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    if kind == "extra_forbidden":
        is_top = len(path) == 1
        near = difflib.get_close_matches(param, known, n=1) if is_top else []
        near = [REPLACED[param]] if is_top and param in REPLACED else near
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return invalid(f"Unknown parameter: '{param}'.{hint}", param, "unknown_parameter")
    return _of_value(first, param)


def _of_value(first: Mapping[str, Any], param: str) -> ApiError:
    kind, context, value = first["type"], first.get("ctx", {}), first.get("input")
    if kind in _LIMITS:
        sign, key, code, words = _LIMITS[kind]
        number = "integer" if isinstance(value, int) else "decimal"
        message = f"Invalid '{param}': {number} {words}. Expected a value {sign} {context[key]}"
        return invalid(f"{message}, but got {value} instead.", param, f"{number}_{code}")
    if kind in ("too_long", "too_short"):
        length, code = context["actual_length"], "array_above_max_length"
        if kind == "too_short" and length == 0:
            return invalid(f"Invalid '{param}': empty array.", param, "empty_array")
        side = "maximum" if kind == "too_long" else "minimum"
        limit = context["max_length" if kind == "too_long" else "min_length"]
        word = "long" if kind == "too_long" else "short"
        code = code if kind == "too_long" else "array_below_min_length"
        message = f"Invalid '{param}': array too {word}. Expected an array with {side} length {limit}"
        return invalid(f"{message}, but got an array with length {length} instead.", param, code)
    if kind in ("string_too_long", "string_too_short"):
        return invalid(f"Invalid '{param}': {first['msg'].lower()}.", param, "invalid_string_length")
    if kind == "literal_error":
        message = f"Invalid value: {_shown(value)}. Supported values are: {context['expected']}."
        return invalid(message, param, "invalid_value")
    if kind == "finite_number":
        return invalid(f"Invalid '{param}': the number must be finite.", param, "invalid_value")
    if kind == "value_error":
        return invalid(str(context.get("error", first["msg"])), param or None, "invalid_value")
    if kind == "int_from_float":
        kind = "int_type"
    if kind.endswith(("_type", "_parsing")):
        return _of_type(kind, context.get("expected"), param, value)
    return invalid(f"Invalid '{param}': {first['msg'].lower()}.", param or None, "invalid_value")


def _of_type(kind: str, expected: str | None, param: str, value: Any) -> ApiError:
    expected = expected or _KINDS.get(kind.rsplit("_", 1)[0], "something else")
    message = f"Invalid type for '{param}': expected {expected}, but got {_kind_of(value)} instead."
    return invalid(message, param, "invalid_type")


def _param(path: Sequence[Any]) -> str:
    """``messages[0].content``"""
    words = ""
    for step in path:
        if isinstance(step, int):
            words += f"[{step}]"
        else:
            words += f".{step}"[:LONGEST_NAME] if words else str(step)[:LONGEST_NAME]
    return words


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str) and not value:
        return "an empty string"
    names = ((bool, "a boolean"), (int, "an integer"), (float, "a decimal"), (str, "a string"))
    others = ((list, "an array"), (dict, "an object"))
    return next((words for kind, words in (*names, *others) if isinstance(value, kind)), "something else")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
