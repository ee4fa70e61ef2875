"""Paths and methods that are not there: what is said of them, whoever asks."""

import json

import pytest
from tests.serving.test_bad_input import TEXT, error_of


@pytest.fixture(scope="module")
def http(running):
    with running.http() as client:
        yield client


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/v1/chat/completions", "Did you mean /v1/chat/completions?"),
        ("/v1/chat/completions/", "Did you mean /v1/chat/completions?"),
        ("/v1/responses", "use /v1/chat/completions"),
        ("/v1/images/generations", "(POST /v1/images/generations)."),
    ],
)
def test_a_path_that_is_nearly_one(http, path, hint):
    answer = http.post(path, json=TEXT)
    assert answer.status_code == 404
    assert error_of(answer)["message"].endswith(hint) or hint in error_of(answer)["message"]


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_the_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert http.head("/nowhere").status_code == 404
    assert http.head("/v1/completions").headers["allow"] == "POST"


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
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("TRACE", "/v1/models", "GET, HEAD"),
    ],
)
def test_other_methods(http, method, path, allowed):
    answer = http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    assert error_of(answer)["code"] == "method_not_supported"
