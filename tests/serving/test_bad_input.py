"""Whatever is wrong with a request: the right status, OpenAI's error object, and never a stack trace."""

import gzip
import json

import openai
import pytest

NAME = "tiny"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
TEXT = {"model": NAME, "prompt": "a"}
WORDS = "a string or an array of at most 16 strings"


def called(arguments):
    """A conversation in which a tool was called, as it comes back from whoever collected a stream."""
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [*CHAT["messages"], answer, {"role": "tool", "tool_call_id": "a", "content": "x"}]


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
    *[
        ("completions", {**TEXT, "logit_bias": {key: 1}}, 400, "invalid_value", "logit_bias", "logit_bias")
        for key in ("-3", "99999", "1_0", "\u0661", " 1", "9" * 5000)
    ],
    ("completions", {**TEXT, "n": 10**6}, 400, "integer_above_max_value", "n", "<= 128"),
    ("completions", {**TEXT, "z" * 5000: 1}, 400, "unknown_parameter", "z" * 100, "Unknown parameter"),
    ("completions", {**TEXT, "prompt": ["a"] * 50_000}, 400, "too_many_sequences", "n", "at most 72"),
    ("completions", {**TEXT, "prompt": [[5]] * 50_000}, 400, "too_many_sequences", "n", "at most 72"),
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
    ("chat/completions", {**CHAT, "functions": []}, 400, "unknown_parameter", "functions", "mean 'tools'?"),
    (
        "chat/completions",
        {**CHAT, "tools": [{"type": "custom", "custom": {"name": "a"}}]},
        400,
        "invalid_value",
        "tools[0].type",
        "'function'",
    ),
    (
        "chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": "a"}] * 20_000},
        400,
        "context_length_exceeded",
        "messages",
        "at least 20000",
    ),
    ("chat/completions", {**CHAT, "messages": called("[" * 900 + "]" * 900)}, 400, None, None, "messages"),
    ("embeddings", {"model": NAME, "input": ["a"] * 2049}, 400, None, "input", "at most 2048"),
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


def test_a_body_that_is_packed_is_refused(http):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = http.post("/v1/completions", content=gzip.compress(json.dumps(TEXT).encode()), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (415, "unsupported_content_encoding")


@pytest.mark.parametrize("arguments", ['{"a": ', "", "[" * 50_000, '{"a": 1}'])
def test_what_a_model_wrote_wrong_may_be_shown_to_it(http, arguments):
    """Broken arguments are in the conversation as text; those that nest are as long as they are."""
    answer = http.post(
        "/v1/chat/completions", json={**CHAT, "messages": called(arguments), "max_tokens": 1}
    )
    assert answer.status_code == (400 if len(arguments) > 1000 else 200), answer.text


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
