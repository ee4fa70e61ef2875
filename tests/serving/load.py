"""Many clients that behave and misbehave, against a real server process.

    python -m tests.serving.load --requests 10000 --clients 64

Of the requests some are good, streamed or not, and every one of those has one right answer; others leave
in the middle, run out of time, or are not requests at all. At the end nothing may be left over in the
server: no running sequence, no page held by one, no open connection, no memory that grew with requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

NAME = "tiny"
TEXT = ["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。", "the cat sat on the mat and the dog sat too. "]
START_SECONDS, ANSWER_SECONDS = 300.0, 300.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WEIGHTS = {"whole": 30, "streamed": 25, "chat": 10, "leaves": 15, "deadline": 8, "bad": 9, "broken": 3}
SAMPLE_SECONDS = 0.25
# What memory may grow by once warm: a number of rows that no step had before takes about 2 MiB, because
# oneDNN keeps a program for each product with it. There are few such numbers (row_counts.py of generation),
# and requests as mixed as these meet nearly all at the start. Of 10,000 requests 6,000 lie between the
# times compared: 3 KiB left behind by each would be seen.
GROWTH_MIB = 16.0
REQUESTS_TO_WARM = 2000


@dataclass
class Good:
    """A request with one right answer."""

    body: dict[str, Any]
    text: str = ""
    finish_reason: str = ""


@dataclass
class Report:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    retries: int = 0
    seconds: float = 0.0
    memory_mib: list[tuple[float, float]] = field(default_factory=list)  # after so many seconds
    exit_code: int | None = None

    def check(self, is_right: bool, what: str) -> None:
        if not is_right:
            self.problems.append(what)

    @property
    def growth_mib(self) -> float:
        """Of memory, from the second fifth of the run to the last: caches are warm by then."""
        held = [mib for _, mib in self.memory_mib]
        fifth = max(1, len(held) // 5)
        return statistics.median(held[-fifth:]) - statistics.median(held[fifth : 2 * fifth])


def write_model(folder: Path) -> None:
    """A tiny model with a tokenizer and a chat template."""
    from mtnlg import MegatronLmModel, MegatronModelConfig, Tokenizer
    from mtnlg.tokens.chat_template import DEFAULT_CHAT_TEMPLATE

    tokenizer = Tokenizer.train(TEXT * 5, 340)
    tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    config = MegatronModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        init_method_std=0.3,
        activation_function="gelu_tanh",
    )
    MegatronLmModel(config, tokenizer, seed=5).save_pretrained(folder)


@contextmanager
def server_process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """``mtnlg serve`` on a free port; the process and its address. Its log is ``folder/server.log``."""
    command = [sys.executable, "-m", "mtnlg", "serve", str(folder), "--port", "0", "--model-name", NAME]
    command += ["--log-format", "json", "--compile", "off", *options]
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ})
    try:
        yield process, _address(process, log)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server is, once it is ready."""
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        for line in log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if entry.get("event") == "ready":
                    return str(entry["url"])
        time.sleep(0.05)
    raise AssertionError(f"the server did not become ready:\n{log.read_text(encoding='utf-8')}")


def good_requests() -> list[Good]:
    """Prompts of many lengths, greedy and seeded, that share beginnings and do not."""
    prompts = ["the cat", "the cat sat on the mat and", "春眠", "春眠不觉晓，处处闻啼鸟。", "dog " * 12]
    prompts += ["the cat sat on the mat and the dog " * 4, "花落知多少。" * 5]
    found = []
    for number, prompt in enumerate(prompts * 4):
        body = {"model": NAME, "prompt": prompt, "max_tokens": 4 + 5 * (number % 5), "temperature": 0}
        if number % 3 == 0:
            body |= {"temperature": 0.9, "top_p": 0.9, "seed": number}
        if number % 7 == 0:
            body |= {"stop": ["a", "。"]}
        found.append(Good(body))
    return found


class Load:
    """Clients, and what they see.

    Args:
        url: of the server.
        seed: decides who does what.
    """

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.seed, self.report = url, seed, Report()
        self.good = good_requests()
        self.chat = Good({"model": NAME, "messages": [{"role": "user", "content": "the dog"}]})
        self.chat.body |= {"max_tokens": 12, "temperature": 0}
        self._kinds: dict[str, Callable[[random.Random], Awaitable[None]]] = {
            "whole": self._whole,
            "streamed": self._streamed,
            "chat": self._chat,
            "leaves": self._leaves,
            "deadline": self._deadline,
            "bad": self._bad,
            "broken": self._broken,
        }

    async def run(self, num_requests: int, num_clients: int, process_id: int) -> Report:
        limits = httpx.Limits(max_connections=num_clients + 8, max_keepalive_connections=num_clients)
        async with httpx.AsyncClient(base_url=self.url, timeout=ANSWER_SECONDS, limits=limits) as self.http:
            await self._learn_answers()
            numbers, began = iter(range(num_requests)), time.monotonic()
            watcher = asyncio.create_task(self._watch_memory(process_id, began))
            await asyncio.gather(*(self._client(numbers) for _ in range(num_clients)))
            self.report.seconds = time.monotonic() - began
            watcher.cancel()
            await self._nothing_left()
        return self.report

    async def _learn_answers(self) -> None:
        """What each good request is answered when nobody else asks."""
        for good in self.good:
            answer = (await self._post(COMPLETIONS, good.body)).json()["choices"][0]
            good.text, good.finish_reason = answer["text"], answer["finish_reason"]
        answer = (await self._post(CHAT, self.chat.body)).json()["choices"][0]
        self.chat.text = answer["message"]["content"]

    async def _client(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            rng = random.Random(self.seed * 1_000_003 + number)
            kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            try:
                await self._kinds[kind](rng)
            except Exception as error:
                self.report.problems.append(f"{kind} {number}: {type(error).__name__}: {error}")
            self.report.counts[kind] += 1

    # -- those that behave

    async def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The answer, asked for again while the server is full."""
        while True:
            answer = await self.http.post(path, json=body)
            if answer.status_code != 429:
                return answer
            self.report.retries += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]) / 10)

    async def _whole(self, rng: random.Random) -> None:
        good = rng.choice(self.good)
        answer = await self._post(COMPLETIONS, good.body)
        self.report.check(answer.status_code == 200, f"whole: status {answer.status_code}: {answer.text}")
        choice = answer.json()["choices"][0]
        self._compare(good, choice["text"], choice["finish_reason"])

    async def _streamed(self, rng: random.Random) -> None:
        good = rng.choice(self.good)
        text, reason = "", ""
        async for chunk in self._chunks(good.body | {"stream_options": {"include_usage": True}}):
            for choice in chunk["choices"]:
                text += choice["text"]
                reason = choice["finish_reason"] or reason
        self._compare(good, text, reason)

    async def _chat(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            answer = await self._post(CHAT, self.chat.body)
            self._compare(self.chat, answer.json()["choices"][0]["message"]["content"])
            return
        text = ""
        async for chunk in self._chunks(self.chat.body, CHAT):
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        self._compare(self.chat, text)

    async def _chunks(self, body: dict[str, Any], path: str = COMPLETIONS) -> Any:
        async with self.http.stream("POST", path, json=body | {"stream": True}) as answer:
            if answer.status_code == 429:
                await answer.aread()
                self.report.retries += 1
                return
            self.report.check(answer.status_code == 200, f"streamed: status {answer.status_code}")
            is_done = False
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    is_done = True
                elif line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
            self.report.check(is_done, "streamed: the stream ended without [DONE]")

    def _compare(self, good: Good, text: str, reason: str = "") -> None:
        if text != good.text or (good.finish_reason and reason != good.finish_reason):
            expected = (good.text, good.finish_reason)
            self.report.problems.append(f"{good.body}: {(text, reason)} instead of {expected}")

    # -- those that do not

    async def _leaves(self, rng: random.Random) -> None:
        """Asks for a long answer and goes away before it, or in the middle."""
        body = {"model": NAME, "prompt": "the dog", "max_tokens": 200, "ignore_eos": True, "temperature": 1}
        if rng.random() < 0.4:
            with suppress(httpx.TimeoutException):
                await self.http.post(COMPLETIONS, json=body, timeout=rng.uniform(0.001, 0.2))
            return
        most = rng.randrange(1, 30)
        async with self.http.stream("POST", COMPLETIONS, json=body | {"stream": True}) as answer:
            async for _line in answer.aiter_lines():
                most -= 1
                if most <= 0:
                    return

    async def _deadline(self, rng: random.Random) -> None:
        """Gives the server a time to answer in: what there is by then is the answer."""
        good = rng.choice([good for good in self.good if good.body["temperature"] == 0])
        body = good.body | {"timeout": 10 ** rng.uniform(-3, 0.5)}
        answer = await self._post(COMPLETIONS, body)
        if answer.status_code == 504:  # not even one token
            self.report.check(answer.json()["error"]["code"] == "timeout", answer.text)
            return
        self.report.check(answer.status_code == 200, f"deadline: {answer.status_code}: {answer.text}")
        text = answer.json()["choices"][0]["text"]
        self.report.check(good.text.startswith(text), f"deadline: {text!r} of {good.text!r}")

    async def _bad(self, rng: random.Random) -> None:
        """Something that is no request, and hears why."""
        method, path, content = rng.choice(BAD)
        headers = {"Content-Type": "application/json"}
        answer = await self.http.request(method, path, content=content, headers=headers)
        seen = f"bad {method} {path} {content[:60]!r}: {answer.status_code}: {answer.text[:300]}"
        self.report.check(400 <= answer.status_code < 500, seen)
        self.report.check(bool(answer.json()["error"]["message"]) and "Traceback" not in answer.text, seen)

    async def _broken(self, rng: random.Random) -> None:
        """Half a request, and then silence or nothing."""
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps(self.good[0].body).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        whole = head.encode() + body
        writer.write(whole[: rng.randrange(1, len(whole))])
        with suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(rng.uniform(0, 0.05))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        del reader

    # -- afterwards

    async def _watch_memory(self, process_id: int, began: float) -> None:
        while True:
            self.report.memory_mib.append((time.monotonic() - began, memory_mib(process_id)))
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _nothing_left(self) -> None:
        """Every slot and page is free again, and the server answers."""
        ends = time.monotonic() + 30
        busy: dict[str, float] = {}
        while time.monotonic() < ends:
            found = metrics((await self.http.get("/metrics")).text)
            names = ("mtnlg_requests_running", "mtnlg_requests_waiting", "mtnlg_cache_tokens")
            busy = {name: found[name] for name in names if found[name]}
            if not busy:
                break
            await asyncio.sleep(0.05)
        self.report.check(not busy, f"left over in the server: {busy}")
        self.report.check((await self.http.get("/ready")).status_code == 200, "the server is not ready")
        await self._whole(random.Random(0))


BAD: list[tuple[str, str, bytes]] = [
    ("POST", COMPLETIONS, b""),
    ("POST", COMPLETIONS, b"{"),
    ("POST", COMPLETIONS, b"[1, 2]"),
    ("POST", COMPLETIONS, b'{"prompt": "\xff\xfe"}'),
    ("POST", COMPLETIONS, b"{}"),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "temperature": NaN}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "temperature": -1}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "max_tokens": -5}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "max_tokens": "many"}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "a", "n": 100000}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": [999999], "max_tokens": 2}'),
    ("POST", COMPLETIONS, b'{"model": "other", "prompt": "a"}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "' + b"dog " * 2000 + b'"}'),
    ("POST", COMPLETIONS, b'{"model": "tiny", "prompt": "' + b"x" * (5 * 2**20) + b'"}'),
    ("POST", CHAT, b'{"model": "tiny", "messages": "hello"}'),
    ("POST", CHAT, b'{"model": "tiny", "messages": [{"role": "cat", "content": "a"}]}'),
    ("GET", COMPLETIONS, b""),
    ("POST", "/v1/nothing", b"{}"),
    ("GET", "/../../etc/passwd", b""),
]


def metrics(text: str) -> dict[str, float]:
    """Prometheus' text format: samples without labels by name."""
    lines = (line.split(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {parts[0]: float(parts[1]) for parts in lines}


def memory_mib(process_id: int) -> float:
    """Memory of a process that is its own."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def num_sockets(process_id: int) -> int:
    """Open sockets of a process."""
    found = 0
    for entry in Path(f"/proc/{process_id}/fd").iterdir():
        with suppress(OSError):
            found += os.readlink(entry).startswith("socket:")
    return found


def run_load(folder: Path, num_requests: int, num_clients: int, seed: int = 1, *options: str) -> Report:
    """The whole: a server, the clients, and its end."""
    write_model(folder)
    with server_process(folder, *options) as (process, url):
        sockets = num_sockets(process.pid)
        report = asyncio.run(Load(url, seed).run(num_requests, num_clients, process.pid))
        ends = time.monotonic() + 10
        while num_sockets(process.pid) > sockets and time.monotonic() < ends:
            time.sleep(0.05)
        grown = report.growth_mib
        is_warm = num_requests >= REQUESTS_TO_WARM  # a short run is all warming up
        report.check(
            not is_warm or grown < GROWTH_MIB,
            f"memory grew by {grown:.1f} MiB once warm, {GROWTH_MIB} are allowed",
        )
        left = num_sockets(process.pid) - sockets
        report.check(left <= 0, f"{left} connections were left open")
        process.send_signal(signal.SIGTERM)
        report.exit_code = process.wait(60)
        report.check(report.exit_code == 0, f"the server ended with {report.exit_code}")
        log = (folder / "server.log").read_text(encoding="utf-8")
        report.check("Traceback" not in log, f"the log has a stack trace:\n{log[-3000:]}")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options, further = parser.parse_known_args()  # what follows goes to `mtnlg serve`
    with tempfile.TemporaryDirectory(prefix="mtnlg-load-") as folder:
        report = run_load(Path(folder), options.requests, options.clients, options.seed, *further)
    total = sum(report.counts.values())
    print(
        f"{total} requests in {report.seconds:.0f} s, {report.retries} asked again: {dict(report.counts)}"
    )
    held = [mib for _, mib in report.memory_mib]
    tenths = " ".join(f"{held[len(held) * tenth // 10]:.0f}" for tenth in range(10))
    print(f"memory, MiB: {tenths} {held[-1]:.0f}; {report.growth_mib:+.1f} once warm")
    for problem in report.problems[:20]:
        print(f"- {problem}")
    print(f"{len(report.problems)} problems")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
