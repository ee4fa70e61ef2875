"""Connections that are slow, huge, many or gone: nobody else waits for them and no slot is lost."""

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest
from tests.serving.conftest import eventually

from mtnlg.config.generation import EngineConfig

NAME = "tiny"
LONG = {"model": NAME, "prompt": "the cat", "max_tokens": 200, "ignore_eos": True}
CHAT = {
    "model": NAME,
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 200,
    "ignore_eos": True,
}


def raw(port, data, wait=True):
    """What a server answers to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        return read_all(connection) if wait else b""


def read_all(connection):
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionResetError:
        return found
    return found


def status_and_error(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.fixture(scope="module")
def strict(start):
    """A server without patience."""
    options = dict(header_timeout_seconds=0.2, body_timeout_seconds=0.3, max_body_bytes=2000)
    with start(max_header_bytes=3000, max_connections=8, **options) as found:
        yield found


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: "])
def test_headers_that_never_end(strict, sent):
    status, error = status_and_error(raw(strict.port, sent))
    assert (status, error["code"]) == (408, "request_timeout")


def test_headers_that_trickle_are_not_waited_for(strict):
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as connection:
        began = time.monotonic()
        try:
            while time.monotonic() - began < 20:
                connection.sendall(b"G")
                connection.settimeout(0.02)
                try:
                    if connection.recv(1000):
                        break
                except TimeoutError:
                    continue
        except OSError:
            return
        assert time.monotonic() - began < 20


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_that_never_ends(strict, path):
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    )
    status, error = status_and_error(raw(strict.port, head.encode() + b'{"model":'))
    assert (status, error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("headers", [
    b"X-A: " + b"a" * 5000, b"X-A: a\r\n" * 500, b"\r\n".join(b"X-%d: b" % n for n in range(500)),
])  # fmt: skip
def test_headers_that_are_too_large(strict, headers):
    status, error = status_and_error(
        raw(strict.port, b"GET /health HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n\r\n")
    )
    assert (status, error["code"]) == (431, "headers_too_large")


def test_a_path_that_is_too_long(strict):
    status, _ = status_and_error(raw(strict.port, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"))
    assert status == 431


@pytest.mark.parametrize("stream", [False, True])
def test_http_of_1996_gets_no_chunks(running, stream):
    body = {**LONG, "max_tokens": 3, "stream": stream}
    sent = as_http("/v1/completions", body).replace(b"HTTP/1.1", b"HTTP/1.0")
    head, _, content = raw(running.port, sent).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert content.endswith(b"data: [DONE]\n\n") if stream else json.loads(content)["choices"]


def test_requests_in_a_row_and_bodies_in_chunks(running):
    """Three requests before the first answer, one of them in chunks; no other protocol is changed to."""
    plain = as_http("/v1/completions", {**LONG, "max_tokens": 2})
    head, _, content = plain.partition(b"\r\n\r\n")
    head = head.rpartition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue"
    chunked = head + b"\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    answer = raw(running.port, plain + chunked + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"HTTP/1.1 100 Continue") == 1
    assert answer.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00\x01", b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http(strict, junk):
    status, _ = status_and_error(raw(strict.port, junk))
    assert status in (400, 408)


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large(strict, is_chunked):
    body = b'{"prompt": "' + b"a" * 20_000 + b'"}'
    pieces = iter([body[:9000], body[9000:]])
    content = pieces if is_chunked else body
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{strict.url}/v1/completions", content=content, headers=headers, timeout=30)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_too_many_connections(strict):
    held = [socket.create_connection(("127.0.0.1", strict.port), timeout=30) for _ in range(8)]
    try:
        status, error = status_and_error(raw(strict.port, b""))
    finally:
        for connection in held:
            connection.close()
    assert (status, error["code"]) == (503, "too_many_connections")
    eventually(lambda: len(strict.server._uvicorn.server_state.connections) == 0)
    assert strict.get("/health").status_code == 200


# -- clients that leave


@pytest.fixture
def held(start):
    """A server of two slots whose steps wait for leave."""
    with start(EngineConfig(max_batch_size=2, max_queue_size=2, compile="off")) as found:
        yield found


def num_present(held):
    statistics = held.engine.statistics
    return statistics.running + statistics.waiting


def is_idle(held):
    return num_present(held) == 0


def begin(held, path, body):
    """Send a request and let its first step begin; the connection."""
    connection = socket.create_connection(("127.0.0.1", held.port), timeout=30)
    connection.sendall(as_http(path, body))
    return connection


def as_http(path, body):
    """The bytes of a request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", CHAT)])
def test_whoever_leaves_frees_the_slot_within_one_step(held, path, body, stream):
    held.runner.hold()
    connection = begin(held, path, {**body, "stream": stream})
    held.runner.allow(3)
    eventually(lambda: held.runner.num_steps == 3)
    connection.close()
    eventually(lambda: held.engine._given_up or is_idle(held))
    held.runner.allow(1)  # the step that was waiting to run, if there was one
    eventually(lambda: is_idle(held))
    assert held.runner.num_steps <= 4
    eventually(lambda: held.server.state.num_busy == 0)


def test_whoever_leaves_the_queue_is_forgotten(held):
    held.runner.hold()
    running = [begin(held, "/v1/completions", LONG) for _ in range(2)]
    eventually(lambda: num_present(held) == 2)
    waiting = begin(held, "/v1/completions", LONG)
    eventually(lambda: num_present(held) == 3)
    waiting.close()
    eventually(lambda: len(held.engine._given_up) == 1)
    for connection in running:
        connection.close()
    held.runner.allow()
    eventually(lambda: is_idle(held))
    assert held.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_samples_of_one_request_leave_together(held):
    before = held.engine.statistics.finish_reasons.get("cancelled", 0)
    held.runner.hold()
    connection = begin(held, "/v1/completions", {**LONG, "n": 4, "temperature": 1})
    eventually(lambda: num_present(held) == 4)
    connection.close()
    eventually(lambda: held.server.state.num_busy == 0 or len(held.engine._given_up) == 4)
    held.runner.allow()
    eventually(lambda: is_idle(held))
    assert held.engine.statistics.finish_reasons["cancelled"] == before + 4


def test_a_full_queue_refuses_with_a_time(held):
    held.runner.hold()
    connections = [begin(held, "/v1/completions", LONG) for _ in range(4)]
    eventually(lambda: num_present(held) == 4)
    with pytest.raises(openai.RateLimitError) as caught:
        held.openai().completions.create(model=NAME, prompt="a")
    assert caught.value.code == "engine_overloaded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert held.get("/health").status_code == held.get("/ready").status_code == 200  # busy is not broken
    for connection in connections:
        connection.close()
    held.runner.allow()
    eventually(lambda: is_idle(held))
    assert held.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_a_request_that_fits_only_in_part_takes_no_slot(held):
    held.runner.hold()
    connections = [begin(held, "/v1/completions", LONG) for _ in range(2)]
    eventually(lambda: num_present(held) == 2)
    answer = held.post("/v1/completions", {**LONG, "n": 3})
    assert answer.status_code == 429
    for connection in connections:
        connection.close()
    held.runner.allow()
    eventually(lambda: is_idle(held))


def test_a_deadline_ends_with_what_there_is(held):
    held.runner.hold()
    begun = [begin(held, "/v1/completions", {**LONG, "timeout": 0.5}) for _ in range(2)]
    eventually(lambda: num_present(held) == 2)
    held.runner.allow(2)  # both have a token now
    eventually(lambda: held.runner.num_steps == 2)
    begun.append(begin(held, "/v1/completions", {**LONG, "timeout": 0.1}))  # both slots are taken
    eventually(lambda: num_present(held) == 3)
    time.sleep(0.6)  # the deadlines themselves
    held.runner.allow()
    answers = [connection.recv(65536) for connection in begun]
    for connection in begun:
        connection.close()
    answer = json.loads(answers[0].partition(b"\r\n\r\n")[2])
    assert answer["choices"][0]["finish_reason"] == "length"
    assert 1 <= answer["usage"]["completion_tokens"] < 200
    status, error = status_and_error(answers[2])
    assert (status, error["code"]) == (504, "timeout")


def test_a_reader_that_takes_nothing_is_hung_up_on(start):
    """The socket's buffers fill with a long answer that nobody reads; then the connection is cut."""
    with start(send_timeout_seconds=0.2) as running:
        body = {
            **LONG,
            "stream": True,
            "n": 60,
            "logprobs": 20,
            "temperature": 1,
            "max_tokens": 240,
            "prompt": "a",
        }
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(as_http("/v1/completions", body))
        eventually(lambda: running.server.state.num_busy == 1)
        eventually(lambda: running.server.state.num_busy == 0)
        eventually(lambda: is_idle(running))
        connection.close()
        assert running.server.state.metrics.disconnects._value.get() == 1


def test_a_hundred_clients_that_come_and_go(running):
    """Half leave in the middle; every other is answered, and nothing is left behind."""

    async def ask(client, number):
        body = {**LONG, "stream": bool(number % 2), "max_tokens": 20}
        if number % 4 < 2:
            answer = await client.post("/v1/completions", json=body)
            return answer.status_code
        try:
            await asyncio.wait_for(client.post("/v1/completions", json=body), 0.01 * (number % 7))
        except (TimeoutError, httpx.HTTPError):
            return None
        return None

    async def everybody():
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits) as client:
            return await asyncio.gather(*[ask(client, number) for number in range(100)])

    statuses = asyncio.run(everybody())
    assert [status for status in statuses if status is not None] == [200] * 50
    eventually(lambda: is_idle(running))
    eventually(lambda: running.server.state.num_busy == 0)
    assert running.engine.statistics.cache_tokens == 0
