"""Keys and what each may ask for: with a clock of our own, and over HTTP."""

import hashlib

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serving.conftest import eventually

from mtnlg.config.errors import ConfigError
from mtnlg.config.serving import ServerConfig
from mtnlg.serving.errors import ApiError
from mtnlg.serving.keys import Keys
from mtnlg.serving.limits import Allowance, Bucket, Caller, as_duration

NAME = "tiny"
KEY, OTHER = "sk-alice-0123456789", "sk-bob-0123456789"
BODY = {"model": NAME, "prompt": "a", "max_tokens": 2}


class Clock:
    """Stands still until it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_bucket_fills_up_steadily():
    clock = Clock()
    bucket = Bucket(60, clock)
    assert [bucket.take(1) for _ in range(60)] == [0.0] * 60
    assert bucket.take(1) == pytest.approx(1.0)  # a second from now
    clock.now += 1
    assert bucket.take(1) == 0.0
    assert bucket.take(3) == pytest.approx(3.0)
    bucket.give_back(3)
    assert bucket.take(3) == 0.0
    clock.now += 3600
    assert bucket.left == 60


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20)), max_size=60))
def test_no_minute_gives_more_than_twice_its_share(steps):
    """A burst and what fills up meanwhile: never more than that, in any minute."""
    clock, bucket, taken = Clock(), None, []
    bucket = Bucket(20, clock)
    for wait, amount in steps:
        clock.now += wait
        if bucket.take(amount) == 0.0:
            taken.append((clock.now, amount))
    for begins, _ in taken:
        assert sum(amount for at, amount in taken if begins <= at < begins + 60) <= 40


def test_what_a_refusal_says():
    clock = Clock()
    caller = Caller("alice", Allowance(requests_per_minute=2, tokens_per_minute=100, concurrency=2), clock)
    caller.enter()
    caller.enter()
    with pytest.raises(ApiError, match="Concurrency limit reached for alice: Limit 2, running 2") as caught:
        caller.enter()
    assert caught.value.status_code == 429
    caller.leave()
    with pytest.raises(ApiError, match=r"requests per min.*Limit 2, Used 2, Requested 1.*in 30s") as caught:
        caller.enter()
    assert caught.value.headers["Retry-After"] == "30"
    assert caught.value.body["error"] | {"message": ""} == {
        "message": "", "type": "requests", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip
    caller.charge(80)
    with pytest.raises(ApiError, match=r"tokens per min.*Limit 100, Used 80, Requested 40.*12s"):
        caller.charge(40)
    with pytest.raises(ApiError, match="Request too large for alice"):
        caller.charge(101)


@pytest.mark.parametrize(("seconds", "text"), [(0.12, "120ms"), (8.64, "8.64s"), (90, "1m30s"), (0, "0ms")])
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert as_duration(seconds) == text


# -- keys


def keys_of(tmp_path, text, **options):
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    return Keys.of_config(ServerConfig(api_key_file=str(path), **options))


def test_a_file_of_keys_with_limits(tmp_path):
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    keys = keys_of(
        tmp_path,
        f"# ours\n- key: {KEY}\n  name: alice\n  concurrency: 3\n"
        f"- sha256: {digest}\n  tokens_per_minute: 7\n",
        requests_per_minute=9,
    )
    alice, bob = keys.caller(f"Bearer {KEY}"), keys.caller(f"bearer  {OTHER}")
    assert (alice.name, alice.allowance) == ("alice", Allowance(9, 0, 3))
    assert (bob.name, bob.allowance) == ("file-2", Allowance(9, 7, 0))


def test_a_file_of_plain_keys(tmp_path):
    keys = keys_of(tmp_path, f"\n{KEY}\n# bob's\n{OTHER}\n")
    assert keys.caller(f"Bearer {OTHER}").name == "file-2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# only this\n", "holds no key"),
        ("- {key: 5}\n", "entry 1: a key is text"),
        ("- key: a b\n", "entry 1: a key is text"),
        ("- name: x\n", "either key or sha256"),
        ("- {key: a, sha256: b}\n", "either key or sha256"),
        ("- {sha256: zz}\n", "64 hexadecimal"),
        ("- {key: a, colour: red}\n", "colour means nothing"),
        ("- {key: a, concurrency: -1}\n", "concurrency is -1"),
        ("- {key: a\n", "no valid YAML in line 2"),
        ("- [a]\n", "write a key"),
        ("a\na\n", "twice"),
    ],
)
def test_a_bad_file_is_explained(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        keys_of(tmp_path, text)


def test_a_file_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    for path, words in (
        (tmp_path / "keys", "no UTF-8"),
        (tmp_path, "cannot be read"),
        (tmp_path / "x", "No such"),
    ):
        with pytest.raises(ConfigError, match=words):
            Keys.of_config(ServerConfig(api_key_file=str(path)))


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "Bearer ", KEY])
def test_without_a_key_nobody_gets_in(header):
    with pytest.raises(ApiError) as caught:
        Keys.of_config(ServerConfig(api_keys=(KEY,))).caller(header)
    assert caught.value.status_code == 401
    assert "didn't provide" in caught.value.body["error"]["message"]


@pytest.mark.parametrize("key", ["sk-wrong-0123456789", KEY[:-1], KEY + "x", KEY.upper(), "é", "\udcff"])
def test_a_wrong_key_is_not_told_back(key):
    with pytest.raises(ApiError) as caught:
        Keys.of_config(ServerConfig(api_keys=(KEY,))).caller(f"Bearer {key}")
    error = caught.value.body["error"]
    assert (caught.value.status_code, error["code"]) == (401, "invalid_api_key")
    assert key not in error["message"]


# -- over HTTP


@pytest.fixture(scope="module")
def guarded(start):
    with start(
        api_keys=(KEY, OTHER), requests_per_minute=100, tokens_per_minute=3000, concurrency=2
    ) as found:
        yield found


def test_the_openai_client_gets_in_with_its_key(guarded):
    assert guarded.openai(api_key=KEY).completions.create(**BODY).choices
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.openai(api_key="sk-wrong-0123456789").completions.create(**BODY)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


def test_what_is_open_and_what_is_not(guarded):
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/"):
        assert guarded.get(path).status_code == 200, path
    for path in ("/v1/models", "/v1/models/tiny", "/tokenizer_info", "/v1/nothing", "/nothing"):
        assert guarded.get(path).status_code == 401, path
    for path in ("/v1/completions", "/tokenize", "/detokenize", "/v1/embeddings"):
        assert guarded.post(path, BODY).status_code == 401, path


def test_headers_say_what_is_left(guarded):
    answer = guarded.post("/v1/completions", BODY, headers={"authorization": f"Bearer {OTHER}"})
    assert answer.headers["x-ratelimit-limit-requests"] == "100"
    assert answer.headers["x-ratelimit-limit-tokens"] == "3000"
    assert int(answer.headers["x-ratelimit-remaining-requests"]) <= 99
    # 50 tokens come back in a second: all that was taken may be there again before the headers are written.
    assert 2900 < int(answer.headers["x-ratelimit-remaining-tokens"]) <= 3000
    assert answer.headers["x-ratelimit-reset-requests"].endswith(("ms", "s"))


def test_a_key_has_its_own_concurrency(guarded):
    guarded.runner.hold()
    mine, other = guarded.openai(api_key=KEY), guarded.openai(api_key=OTHER)
    streams = [mine.completions.create(stream=True, **BODY) for _ in range(2)]
    with pytest.raises(openai.RateLimitError, match="Concurrency limit") as caught:
        mine.completions.create(**BODY)
    assert caught.value.response.headers["retry-after"] == "1"
    third = other.completions.create(stream=True, **BODY)
    guarded.runner.allow()
    for stream in (*streams, third):
        assert list(stream)
    eventually(lambda: guarded.server.state.num_busy == 0)
    assert mine.completions.create(**BODY).choices


def test_tokens_are_charged_and_what_was_not_used_is_given_back(start):
    with start(tokens_per_minute=200) as running:
        client = running.openai()
        word = {"logit_bias": {"0": 100}}  # ends at once
        for _ in range(5):  # 100 wanted, a few used
            client.completions.create(**{**BODY, "max_tokens": 100}, **word)
        with pytest.raises(openai.RateLimitError, match="too large") as caught:
            client.completions.create(**{**BODY, "max_tokens": 300})
        assert caught.value.type == "tokens"
        assert caught.value.response.headers["x-should-retry"] == "false"  # it never fits
        assert "retry-after" not in caught.value.response.headers
        before = running.server.state.keys.caller(None).tokens.left
        with pytest.raises(openai.RateLimitError, match="too large"):
            client.embeddings.create(model=NAME, input=["a b c d"] * 100)
        assert running.server.state.keys.caller(None).tokens.left >= before  # nothing was worked on


def test_requests_a_minute(start):
    with start(requests_per_minute=3) as running:
        answers = [running.post("/v1/tokenize", {"prompt": "a"}) for _ in range(5)]
        assert [answer.status_code for answer in answers].count(429) >= 1
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert running.get("/v1/models").status_code == 200  # no work, no charge
