"""Whatever is wrong with a request: the right status, OpenAI's error object, and never a stack trace."""

import json

import openai
import pytest

NAME = "tiny"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": NAME, "prompt": "a"}
WORDS = "a string or an array of at most 16 strings"

# path, body, status, code, param, words of the message
CASES = [
    ("completions", {"prompt": "a"}, 400, "missing_required_parameter", "model", "'model'"),
    ("completions", {"model": NAME}, 400, "missing_required_parameter", "prompt", "'prompt'"),
    ("completions", {**TEXT, "model": "gpt-4"}, 404, "model_not_found", "model", "`gpt-4` does not exist"),
    (
        "completions",
        {**TEXT, "model": 5},
        400,
        "invalid_type",
        "model",
        "expected a string, but got an integer",
    ),
    ("completions", {**TEXT, "promt": "b"}, 400, "unknown_parameter", "promt", "Did you mean 'prompt'?"),
    (
        "completions",
        {**TEXT, "max_tokens": -1},
        400,
        "integer_below_min_value",
        "max_tokens",
        ">= 0, but got -1",
    ),
    ("completions", {**TEXT, "max_tokens": "5"}, 400, "invalid_type", "max_tokens", "expected an integer"),
    ("completions", {**TEXT, "max_tokens": 2.5}, 400, "invalid_type", "max_tokens", "got a decimal"),
    ("completions", {**TEXT, "max_tokens": True}, 400, "invalid_type", "max_tokens", "got a boolean"),
    ("completions", {**TEXT, "max_tokens": 10**30}, 400, None, "prompt", "maximum context length is 512"),
    ("completions", {**TEXT, "temperature": -0.5}, 400, "decimal_below_min_value", "temperature", ">= 0"),
    ("completions", {**TEXT, "temperature": 2.5}, 400, "decimal_above_max_value", "temperature", "<= 2"),
    ("completions", {**TEXT, "top_p": 0}, 400, "integer_below_min_value", "top_p", "> 0"),
    ("completions", {**TEXT, "top_p": None, "n": 129}, 400, "integer_above_max_value", "n", "<= 128"),
    ("completions", {**TEXT, "prompt": ["a"] * 60, "n": 10}, 400, "too_many_sequences", "n", "at most 72"),
    ("completions", {**TEXT, "logprobs": 21}, 400, "integer_above_max_value", "logprobs", "<= 20"),
    ("completions", {**TEXT, "prompt": []}, 400, "empty_array", "prompt", "empty array"),
    ("completions", {**TEXT, "prompt": [[]]}, 400, "invalid_type", "prompt", "an array of token ids"),
    ("completions", {**TEXT, "prompt": [1, "a"]}, 400, "invalid_type", "prompt", "got an array"),
    ("completions", {**TEXT, "prompt": {"a": 1}}, 400, "invalid_type", "prompt", "got an object"),
    ("completions", {**TEXT, "prompt": [10**6]}, 400, "invalid_value", "prompt", "not in the vocabulary"),
    ("completions", {**TEXT, "prompt": [-1]}, 400, "invalid_type", "prompt", "token ids"),
    ("completions", {**TEXT, "prompt": "a" * 9000}, 400, "context_length_exceeded", "prompt", "512 tokens"),
    (
        "completions",
        {**TEXT, "prompt": [5] * 512},
        400,
        "context_length_exceeded",
        "prompt",
        "512 in the prompt",
    ),
    (
        "completions",
        {**TEXT, "prompt": "", "add_special_tokens": False},
        400,
        "empty_prompt",
        "prompt",
        "no tokens",
    ),
    ("completions", {**TEXT, "stop": [""]}, 400, "invalid_value", "stop", "must not be empty"),
    ("completions", {**TEXT, "stop": ["a"] * 17}, 400, "invalid_type", "stop", WORDS),
    ("completions", {**TEXT, "logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias", "token ids"),
    ("completions", {**TEXT, "logit_bias": {"-3": 1}}, 400, None, None, "logit_bias"),
    ("completions", {**TEXT, "logit_bias": {"99999": 1}}, 400, None, None, "logit_bias"),
    ("completions", {**TEXT, "logit_bias": {"5": 101}}, 400, None, "logit_bias.5", "<= 100"),
    ("completions", {**TEXT, "best_of": 2, "n": 3}, 400, "invalid_value", "best_of", "best_of"),
    ("completions", {**TEXT, "best_of": 2, "stream": True}, 400, "invalid_value", "best_of", "stream"),
    ("completions", {**TEXT, "stream_options": {}}, 400, "invalid_value", "stream_options", "'stream'"),
    ("completions", {**TEXT, "guided_regex": "("}, 400, "invalid_value", "guided_regex", "guided_regex"),
    (
        "completions",
        {**TEXT, "guided_regex": "a", "guided_choice": ["a"]},
        400,
        "invalid_value",
        None,
        "not both",
    ),
    ("completions", {**TEXT, "seed": 2**70}, 400, "integer_above_max_value", "seed", "seed"),
    ("completions", {**TEXT, "timeout": -1}, 400, "integer_below_min_value", "timeout", "> 0"),
    ("chat/completions", {**CHAT, "messages": []}, 400, "empty_array", "messages", "empty array"),
    ("chat/completions", {**CHAT, "messages": "hi"}, 400, "invalid_type", "messages", "expected an array"),
    (
        "chat/completions",
        {**CHAT, "messages": [{"content": "a"}]},
        400,
        "missing_required_parameter",
        "messages[0].role",
        "role",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "boss", "content": "a"}]},
        400,
        "invalid_value",
        "messages[0].role",
        "'user'",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": None}]},
        400,
        "invalid_type",
        "messages[0].content",
        "null",
    ),
    (
        "chat/completions",
        {
            **CHAT,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        },
        400,
        "invalid_type",
        "messages[0].content",
        "text only",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "tool", "content": "a"}]},
        400,
        "missing_required_parameter",
        "messages[0].tool_call_id",
        "tool_call_id",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "a" * 9000}]},
        400,
        "context_length_exceeded",
        "messages",
        "512",
    ),
    (
        "chat/completions",
        {**CHAT, "max_tokens": 512},
        400,
        "context_length_exceeded",
        "messages",
        "512 in the completion",
    ),
    ("chat/completions", {**CHAT, "top_logprobs": 2}, 400, "invalid_value", "top_logprobs", "'logprobs'"),
    ("chat/completions", {**CHAT, "logprobs": 2}, 400, "invalid_type", "logprobs", "a boolean"),
    ("chat/completions", {**CHAT, "tool_choice": "auto"}, 400, "invalid_value", "tool_choice", "'tools'"),
    (
        "chat/completions",
        {**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]},
        400,
        None,
        "tools[0].function.name",
        "tools[0].function.name",
    ),
    (
        "chat/completions",
        {**CHAT, "response_format": {"type": "json_schema"}},
        400,
        "missing_required_parameter",
        "response_format.json_schema",
        "json_schema",
    ),
    (
        "chat/completions",
        {
            **CHAT,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
            },
        },
        400,
        "invalid_value",
        "response_format.json_schema.schema",
        "schema",
    ),
    (
        "chat/completions",
        {**CHAT, "chat_template_kwargs": {"form": 1}},
        400,
        "invalid_value",
        "chat_template_kwargs",
        "form",
    ),
    ("chat/completions", {**CHAT, "functions": []}, 400, "unknown_parameter", "functions", "functions"),
    ("embeddings", {"model": NAME, "input": ""}, 400, "empty_prompt", "input", "no tokens"),
    (
        "embeddings",
        {"model": NAME, "input": "a", "encoding_format": "int8"},
        400,
        "invalid_value",
        "encoding_format",
        "'float'",
    ),
    (
        "embeddings",
        {"model": NAME, "input": "a", "dimensions": 0},
        400,
        "integer_below_min_value",
        "dimensions",
        ">= 1",
    ),
    ("tokenize", {}, 400, "missing_required_parameter", "prompt", "'messages'"),
    ("tokenize", {"messages": [{"role": "x"}]}, 400, "invalid_value", "messages[0].role", "'user'"),
    ("detokenize", {"tokens": [10**6]}, 400, "invalid_value", "tokens", "vocabulary"),
]


@pytest.fixture(scope="module")
def http(running):
    with running.http() as client:
        yield client


def error_of(answer):
    """The error object, which has exactly OpenAI's four fields."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    return body["error"]


@pytest.mark.parametrize(("path", "body", "status", "code", "param", "words"), CASES)
def test_a_bad_field_is_named(http, path, body, status, code, param, words):
    answer = http.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    if code is not None:
        assert (error["code"], error["param"] if param else None) == (code, param)


BODIES = [
    (b"", "JSON object"),
    (b"{", "parse the JSON body"),
    (b"[1]", "JSON object"),
    (b"null", "JSON object"),
    (b'"text"', "JSON object"),
    (b'{"model": "tiny", "prompt": "\xff\xfe"}', "parse the JSON body"),
    (b'{"model": "tiny", "prompt": "\\ud800"}', "parse the JSON body"),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "parse the JSON body"),
    (b'{"model": "tiny", "prompt": "a", "temperature": Infinity}', "parse the JSON body"),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', "temperature"),
    (b"[" * 100_000, "parse the JSON body"),
    (b'{"a":' * 100_000, "parse the JSON body"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=[str(body[:40]) for body, _ in BODIES])
def test_a_body_that_is_no_request(http, body, words):
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert words in error_of(answer)["message"]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=gbk"]
)
def test_only_json_is_read(http, kind):
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post("/v1/completions", content=json.dumps(TEXT).encode(), headers=headers)
    assert answer.status_code == 415
    assert error_of(answer)["code"] == "unsupported_media_type"


PATHS = [
    "/v1", "/v1/", "/v1/complete", "//v1/models", "/v1//models", "/V1/models", "/v1/models/", "/etc/passwd",
    "/../../etc/passwd", "/..%2f..%2fetc/passwd", "/page/../../pyproject.toml", "/page/..%2f..%2fapp.py",
    "/page/%2e%2e/%2e%2e/app.py", "/v1/%00", "/docs", "/redoc", "/v1/completions/",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_are_not_there(running, path):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    connection.request("GET", path)  # as it stands: httpx would tidy it up
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    assert answer.status == 404
    assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["gpt-4", "../tiny", "%2e%2e", "tiny%00", "tiny/x", "%F0%9F%99%82"])
def test_models_that_are_not_there(http, name):
    answer = http.get(f"/v1/models/{name}")
    assert answer.status_code == 404
    assert error_of(answer)["code"] in ("model_not_found", "unknown_url")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/completions", "POST"),
        ("PUT", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
        ("TRACE", "/v1/models", "GET"),
    ],
)
def test_other_methods(http, method, path, allowed):
    answer = http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    assert error_of(answer)["code"] == "method_not_supported"


def test_the_client_raises_what_it_should(client):
    cases = [
        ({"model": "gpt-4"}, openai.NotFoundError),
        ({"max_tokens": -1}, openai.BadRequestError),
        ({"temperature": "hot"}, openai.BadRequestError),
    ]
    for options, kind in cases:
        with pytest.raises(kind) as caught:
            client.completions.create(**{**TEXT, **options})
        assert caught.value.body["message"]


def test_a_fault_of_ours_tells_nothing(start, monkeypatch):
    with start() as running:

        def fail(*_args):
            raise RuntimeError("secret")

        monkeypatch.setattr(running.server.state, "chosen_adapter", fail)
        answer = running.post("/v1/completions", TEXT)
        assert answer.status_code == 500
        error = error_of(answer)
        assert error["type"] == "server_error"
        assert "secret" not in answer.text
        assert answer.headers["x-request-id"] in error["message"]
        monkeypatch.undo()
        assert running.post("/v1/completions", TEXT).status_code == 200


def test_unknown_fields_are_left_out_where_that_is_wanted(start):
    with start(ignore_unknown_fields=True) as running:
        assert running.post("/v1/completions", {**TEXT, "use_beam_search": False}).status_code == 200


@pytest.mark.parametrize(
    "rule",
    [
        {"guided_json": {"$ref": "#"}},
        {"guided_grammar": "start: start"},
        {"guided_grammar": 'root ::= "a" root', "max_tokens": 3},
        {"guided_regex": "(((a{100}){100}){100})"},
        {"guided_regex": "a{9}", "no_repeat_ngram_size": 1},
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_rules_that_lead_nowhere_are_no_fault_of_the_server(running, rule, is_streamed):
    body = {"model": NAME, **TEXT, "temperature": 0, **rule, "stream": is_streamed}
    answer = running.post("/v1/completions", body)
    if answer.headers["content-type"].startswith("text/event-stream"):
        error = json.loads(answer.text.strip().rpartition("data: ")[2])["error"]
    else:
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
    assert error["code"] == "invalid_value"
    assert error["type"] == "invalid_request_error"
    assert running.get("/ready").status_code == 200
