"""Whatever the OpenAPI description allows, and much that it does not: no answer is a fault of the server.

A few seconds here; ``MTNLG_FUZZ_EXAMPLES=2000`` looks longer.
"""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

MUCH_WORK = ("n", "best_of", "max_tokens", "min_tokens", "max_completion_tokens")
NUM_EXAMPLES = int(os.environ.get("MTNLG_FUZZ_EXAMPLES", "12"))
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]
STEPS = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=NUM_EXAMPLES <= 12,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


OPERATIONS = [
    *[("POST", f"/v1/{name}") for name in ("completions", "chat/completions", "embeddings")],
    *[("POST", f"/v1/{name}") for name in ("tokenize", "detokenize")],
    *[("GET", path) for path in ("/v1/models", "/v1/models/{model}", "/tokenizer_info")],
    *[("GET", path) for path in ("/health", "/ready", "/metrics")],
]


@pytest.fixture(scope="module")
def description(running):
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


WAYS = [(*operation, mode) for operation in OPERATIONS for mode in GenerationMode if "GET" not in operation]
WAYS += [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS if "GET" in operation]


@pytest.mark.parametrize(("method", "path", "mode"), WAYS)
def test_no_request_is_a_fault(description, method, path, mode):
    operation = description[path][method]

    @STEPS
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # else nearly all would end at the unknown model
            case.body = {name: value for name, value in case.body.items() if name not in MUCH_WORK}
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()


def test_every_path_is_described(running):
    paths = set(running.get("/openapi.json").json()["paths"])
    assert {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/tokenize", "/health"} <= paths


def test_the_description_asks_nothing_of_others(running):
    text = running.get("/openapi.json").text
    assert "http://" not in text
    assert "https://" not in text
