"""What the server tells of itself: numbers that a Prometheus parser reads, lines without prompts."""

import io
import json

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serving.conftest import eventually

from mtnlg.serving.logs import TextFormatter, logging_to

NAME = "tiny"
BODY = {"model": NAME, "prompt": "a secret cat", "max_tokens": 5, "ignore_eos": True, "temperature": 0}


def numbers(running):
    """Every sample: (name, labels) and value."""
    found = {}
    for family in text_string_to_metric_families(running.get("/metrics").text):
        assert family.documentation
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_numbers_add_up(start):
    with start() as running:
        for _ in range(3):
            running.post("/v1/completions", BODY)
        running.post("/v1/completions", {"model": NAME})
        running.get("/nowhere")
        found = numbers(running)
        path = ("path", "/v1/completions")
        assert found["mtnlg_requests_total", (path, ("status", "200"))] == 3
        assert found["mtnlg_requests_total", (path, ("status", "400"))] == 1
        assert found["mtnlg_requests_total", (("path", "other"), ("status", "404"))] == 1
        assert found["mtnlg_generated_tokens_total", ()] == 15
        assert found["mtnlg_answers_total", (("reason", "length"),)] == 3
        assert found["mtnlg_prompt_tokens_total", ()] == found["mtnlg_prompt_size_tokens_sum", ()] > 0
        for name, count in (
            ("time_to_first_token_seconds", 3),
            ("time_per_output_token_seconds", 12),
            ("queue_time_seconds", 3),
            ("answer_size_tokens", 3),
        ):
            assert found[f"mtnlg_{name}_count", ()] == count
            assert found[f"mtnlg_{name}_bucket", (("le", "+Inf"),)] == count
            buckets = [value for (key, _), value in found.items() if key == f"mtnlg_{name}_bucket"]
            assert buckets == sorted(buckets)
        assert found["mtnlg_batch_size_sum", ()] == found["mtnlg_batch_size_count", ()] > 0
        assert found["mtnlg_requests_running", ()] == found["mtnlg_requests_waiting", ()] == 0
        assert 0 <= found["mtnlg_cache_hit_rate", ()] <= 1
        assert found["mtnlg_ready", ()] == 1


def test_the_queue_and_the_batch_are_seen(running):
    running.runner.hold()
    client = running.openai()
    with client.completions.with_streaming_response.create(
        model=NAME, prompt="a", n=12, max_tokens=3, stream=True
    ):
        eventually(
            lambda: (
                sum(numbers(running)[f"mtnlg_requests_{what}", ()] for what in ("running", "waiting")) == 12
            )
        )
        running.runner.allow()
        eventually(lambda: numbers(running)["mtnlg_requests_running", ()] == 0)
    assert numbers(running)["mtnlg_batch_size_sum", ()] >= 12


def test_paths_do_not_fill_the_counters(running):
    for number in range(5):
        running.get(f"/nowhere/{number}")
        running.get(f"/v1/models/{number}")
    paths = {
        dict(labels).get("path") for name, labels in numbers(running) if name == "mtnlg_requests_total"
    }
    assert {"other", "/v1/models/{model}"} <= paths
    assert not any("nowhere" in str(path) for path in paths)


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_where_that_is_wanted(start, log_prompts):
    stream = io.StringIO()
    with logging_to(stream, "json"), start(log_prompts=log_prompts) as running:
        running.post("/v1/completions", BODY)
        messages = [{"role": "user", "content": "a secret cat"}]
        running.post("/v1/chat/completions", {"model": NAME, "max_tokens": 2, "messages": messages})
        running.post("/v1/completions", {**BODY, "a secret cat": 1})
        running.get("/health")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 200, 400]
    first = requests[0]
    assert first["request_id"].startswith("req_")
    assert (first["method"], first["path"], first["key"]) == ("POST", "/v1/completions", "anonymous")
    assert (first["new_tokens"], first["finish"], first["sequences"]) == (5, "length", 1)
    assert first["seconds"] >= first["first_token_seconds"] >= first["queue_seconds"] >= 0
    assert ("a secret cat" in stream.getvalue()) == log_prompts
    assert ("answer" in first) == log_prompts


def test_a_line_cannot_be_forged(start):
    stream = io.StringIO()
    with logging_to(stream, "json"), start() as running:
        running.get("/%0a%7B%22event%22:%22request%22%7D")
    assert all(json.loads(line)["event"] for line in stream.getvalue().splitlines())


def test_text_for_people():
    import logging

    record = logging.makeLogRecord({"msg": "request", "levelno": logging.INFO, "levelname": "INFO"})
    record.fields = {"path": "/a\nb", "status": 200}
    line = TextFormatter().format(record)
    assert line.endswith('request path="/a\\nb" status=200')
