"""An engine that breaks, pages of other origins, proxies: what the server makes of them."""

import json

import openai
import pytest

from mtnlg.config.generation import EngineConfig

NAME = "tiny"
BODY = {"model": NAME, "prompt": "a", "max_tokens": 3}


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_breaks_is_told_and_seen(start, stream):
    with start() as running:

        def fail(_rows):
            raise RuntimeError("secret of the engine")

        running.engine.runner.run = fail
        answer = running.post("/v1/completions", {**BODY, "stream": stream})
        if stream:
            assert answer.status_code == 200
            error = json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        else:
            assert answer.status_code == 500
            error = answer.json()["error"]
        assert error["type"] == "server_error"
        assert "secret" not in answer.text
        if not running.engine.is_alive:  # it may also go on with other requests
            assert running.get("/health").status_code == 503
            assert running.get("/ready").status_code == 503
            later = running.post("/v1/completions", BODY)
            assert (later.status_code, later.json()["error"]["code"]) == (503, "engine_stopped")


def test_the_client_raises_what_breaks_off_a_stream(start):
    with start() as running:
        run, steps = running.engine.runner.run, []

        def fail(rows):
            steps.append(rows)
            if len(steps) > 3:
                raise RuntimeError("secret of the engine")
            return run(rows)

        running.engine.runner.run = fail
        stream = running.openai().completions.create(**{**BODY, "max_tokens": 50}, stream=True)
        with pytest.raises(openai.APIError, match="had an error") as caught:
            for _chunk in stream:
                continue
        assert "secret" not in str(caught.value)


def test_fewer_pages_than_are_wanted_at_once(start, running):
    """Sequences give pages up and are computed again: each answer is the same as with room for all."""
    body = {**BODY, "prompt": ["the cat", "a"], "n": 3, "max_tokens": 120, "ignore_eos": True}
    body |= {"temperature": 1, "seed": 5}
    expected = running.post("/v1/completions", body).json()["choices"]
    config = EngineConfig(max_batch_size=8, max_queue_size=64, compile="off", cache_gib=1.5e-4)
    with start(config) as small:
        assert small.post("/v1/completions", body).json()["choices"] == expected
        assert small.engine.statistics.preempted > 0


PREFLIGHT = {"origin": "https://a.example", "access-control-request-method": "POST"}


def test_pages_of_other_origins_get_nothing(running):
    import httpx

    answer = httpx.options(f"{running.url}/v1/completions", headers=PREFLIGHT)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers
    simple = httpx.post(
        f"{running.url}/v1/completions", content=json.dumps(BODY), headers={"content-type": "text/plain"}
    )
    assert simple.status_code == 415  # what a page may send without asking


def test_pages_of_a_chosen_origin_may_call(start):
    import httpx

    with start(allow_origins=("https://a.example",)) as running:
        answer = httpx.options(f"{running.url}/v1/completions", headers=PREFLIGHT)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        sent = ", ".join(("authorization", "content-type", "x-stainless-lang", "x-stainless-retry-count"))
        client = {**PREFLIGHT, "access-control-request-headers": sent}  # as OpenAI's own for browsers asks
        assert httpx.options(f"{running.url}/v1/completions", headers=client).status_code == 200
        other = httpx.options(
            f"{running.url}/v1/completions", headers={**PREFLIGHT, "origin": "https://b.example"}
        )
        assert "access-control-allow-origin" not in other.headers
        wrong = running.post("/v1/completions", {}, headers={"origin": "https://a.example"})
        assert wrong.status_code == 400
        assert (
            wrong.headers["access-control-allow-origin"] == "https://a.example"
        )  # so that the page can read why


def test_a_server_without_the_page(start):
    with start(page=False) as running:
        assert running.get("/").status_code == 404


def test_streams_pass_through_proxies_at_once(running):
    answer = running.post("/v1/completions", {**BODY, "stream": True})
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"


def test_a_long_wait_is_filled_with_comments(start, monkeypatch):
    import httpx

    from mtnlg.serving import streaming

    monkeypatch.setattr(streaming, "COMMENT_SECONDS", 0.05)
    with start() as running:
        running.runner.hold()
        with httpx.stream(
            "POST", f"{running.url}/v1/completions", json={**BODY, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": still here"
            running.runner.allow()
            assert "data: [DONE]" in list(lines)
