"""Servers of the same model beside each other: throughput, and how long readers wait.

    python -m benchmarks.serve                                    # all that are installed, bf16 and float32
    LLAMA_SERVER=~/llama.cpp/build/bin/llama-server VLLM=~/vllm/bin/vllm python -m benchmarks.serve
    python -m benchmarks.serve --servers mtnlg llama.cpp --dtypes bf16 --clients 8 --rounds 3 --fresh

GPT-2's shape (124M) with random weights, streamed completions over HTTP, greedy, on the cores of this
machine, which the clients share. All servers of a dtype run side by side and take turns, round by round;
those whose turn it is not are stopped. Every prompt is new, so that no cache of prompts helps.
  fixed     8 clients, each prompts of 128 tokens and 128 new ones
  mixed     1, 8 and 32 clients, prompts of 16 to 384 tokens and 16 to 160 new ones, the same for all
Before all that every server answers one round of 8 clients by itself, in which it may compile and take its
memory; a table of its own shows it.
What has been measured is kept in --state: a run that was broken off goes on, a server that failed can be
measured alone afterwards, and the table has them all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.peers.gpt2_files import prompt
from benchmarks.peers.servers import CONTENDERS, ServerProcess, program

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "serve.md"
WARM_UP = "warm-up"
MOST_SECONDS = 900  # for all requests of a round


@dataclass
class Work:
    """What a number of clients ask for: (prompt tokens, new tokens) of each request."""

    clients: int
    requests: list[tuple[int, int]]


@dataclass
class Seen:
    """What clients saw: seconds."""

    tokens: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def warm_up() -> Work:
    return Work(8, [(128, 64)] * 8)


def works() -> dict[str, Work]:
    rng = random.Random(3)
    sizes = [(rng.choice((16, 32, 64, 128, 256, 384)), rng.randrange(16, 161)) for _ in range(32)]
    return {
        "fixed, 8 clients": Work(8, [(128, 128)] * 16),
        "mixed, 1 client": Work(1, sizes[:3]),
        "mixed, 8 clients": Work(8, sizes[:16]),
        "mixed, 32 clients": Work(32, sizes),
    }


async def run_work(server: ServerProcess, work: Work, seed: int) -> Seen:
    """Let the clients ask until all requests are answered."""
    seen, waiting = Seen(), iter(enumerate(work.requests))

    async def client() -> None:
        for number, (size, new) in waiting:
            await one_request(server, prompt(size, seed * 1000 + number), new, seen)

    began = time.perf_counter()
    async with asyncio.timeout(MOST_SECONDS):
        await asyncio.gather(*(client() for _ in range(work.clients)))
    seen.seconds = time.perf_counter() - began
    return seen


async def one_request(server: ServerProcess, text: str, new: int, seen: Seen) -> None:
    """Stream one completion, over plain sockets: the client costs as little as can be."""
    body = {"model": server.model, "prompt": text, "max_tokens": new, "temperature": 0, "stream": True}
    content = json.dumps(body | server.extra).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    began = last = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{server.name}: {status!r} {(await reader.read())[:500]!r}")
    num_pieces = 0
    async for line in reader:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        choices = json.loads(line[6:]).get("choices") or [{}]
        if not choices[0].get("text"):
            continue
        now = time.perf_counter()
        (seen.between if num_pieces else seen.first).append(now - last)
        last, num_pieces = now, num_pieces + 1
    writer.close()
    if num_pieces < new // 2:
        raise RuntimeError(f"{server.name}: {num_pieces} pieces of {new} tokens in {last - began:.1f} s")
    seen.tokens += new


class Results:
    """What has been measured, kept in a file."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.entries: dict[str, Any] = {}
        if path.is_file() and not fresh:
            self.entries = json.loads(path.read_text())

    def put(self, key: tuple[str, ...], value: Any) -> None:
        self.entries["|".join(key)] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.entries))

    def get(self, *key: str) -> Any:
        return self.entries.get("|".join(key))


def measure(options: argparse.Namespace, results: Results) -> None:
    """All that is not there yet."""
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for dtype in options.dtypes:
        servers = []
        for name in options.servers:
            if not missing(options, results, name, dtype):
                continue
            print(f"{name} {dtype} ...", file=sys.stderr, flush=True)
            try:
                if CONTENDERS[name].program:
                    program(CONTENDERS[name].program)
                server = ServerProcess(name, folder, dtype, options.threads)
            except (RuntimeError, OSError, ImportError) as error:
                results.put((name, dtype, "failure"), str(error))
                print(error, file=sys.stderr)
                continue
            results.put((name, dtype, "failure"), None)
            results.put((name, dtype, "ready"), server.ready_seconds)
            if did(server, dtype, WARM_UP, warm_up(), 999, WARM_UP, results):
                servers.append(server)
        try:
            for number in range(options.rounds):
                for server in servers[:] if number % 2 == 0 else servers[::-1]:
                    if not take_turn(server, dtype, number, options, results):
                        servers.remove(server)
        finally:
            for server in servers:
                server.end()


def missing(options: argparse.Namespace, results: Results, name: str, dtype: str) -> bool:
    return any(
        results.get(name, dtype, work, str(number)) is None
        for work in options.works
        for number in range(options.rounds)
    )


def did(
    server: ServerProcess, dtype: str, name: str, work: Work, seed: int, key: str, results: Results
) -> bool:
    """Whether the server answered everything; it sleeps afterwards, or is ended where it did not."""
    server.wake()
    try:
        seen = asyncio.run(run_work(server, work, seed))
    except (RuntimeError, OSError, ValueError) as error:  # a refusal, a broken connection, no JSON
        print(f"{server.name} {dtype} {name}: {error!r}", file=sys.stderr, flush=True)
        results.put((server.name, dtype, "failure"), f"{name}: {error!r}")
        server.end()
        return False
    results.put((server.name, dtype, *((name,) if name == key else (name, key))), vars(seen))
    print(f"{server.name} {dtype} {name}: {seen.tokens / seen.seconds:.0f} tokens/s", file=sys.stderr)
    server.sleep()
    return True


def take_turn(
    server: ServerProcess, dtype: str, number: int, options: argparse.Namespace, results: Results
) -> bool:
    """Whether the server is still there."""
    for index, name in enumerate(options.works):
        if results.get(server.name, dtype, name, str(number)) is not None:
            continue
        if not did(server, dtype, name, works()[name], 10 * number + index, str(number), results):
            return False
    return True


def table(options: argparse.Namespace, results: Results) -> Iterator[str]:
    """The page of results."""
    yield "# Serving\n"
    yield (
        f"`python -m benchmarks.serve`, {datetime.now(UTC):%Y-%m-%d}, {processor()}, "
        f"{options.threads} cores, medians of {options.rounds} alternating rounds. "
        f"Load at the end: {os.getloadavg()[0]:.1f}.\n"
    )
    yield "GPT-2's shape (124M), random weights, greedy, streamed over HTTP; clients run on the same cores."
    yield "Throughput counts new tokens of all clients. Waits are in milliseconds, between tokens as chunks"
    yield "arrive. Ready: from start to the first answer.\n"
    yield "The first round of each, one server alone, with whatever it compiles and sets up then:\n"
    yield "| server | ready, s | tokens/s | first token, p50 | between, p50 | p95 |"
    yield "|---|---|---|---|---|---|"
    yield from first_rounds(options, results)
    yield ""
    for dtype in options.dtypes:
        for work in options.works:
            yield f"## {dtype}: {work}\n"
            yield (
                "| server | tokens/s | slowest-fastest | of ours | first token, p50 | p95 | p99 | "
                "between, p50 | p95 | p99 | ready, s |"
            )
            yield "|---|---|---|---|---|---|---|---|---|---|---|"
            yield from rows(options, results, dtype, work)
            yield ""


def first_rounds(options: argparse.Namespace, results: Results) -> Iterator[str]:
    for dtype in options.dtypes:
        for name in CONTENDERS:
            if (seen := results.get(name, dtype, WARM_UP)) is None:
                continue
            first, between = (seen[key] for key in ("first", "between"))
            cells = [f"{results.get(name, dtype, 'ready'):.1f}", f"{seen['tokens'] / seen['seconds']:.0f}"]
            cells += [f"{1e3 * at(first, 0.5):.0f}", *(f"{1e3 * at(between, s):.1f}" for s in (0.5, 0.95))]
            yield f"| {name}, {dtype} | {' | '.join(cells)} |"


def rows(options: argparse.Namespace, results: Results, dtype: str, work: str) -> Iterator[str]:
    rates: dict[str, float] = {}
    for name in CONTENDERS:
        found = [results.get(name, dtype, work, str(number)) for number in range(options.rounds)]
        found = [seen for seen in found if seen is not None]
        if failure := results.get(name, dtype, "failure"):
            yield f"| {name} | {failure.splitlines()[0]} |" + " |" * 9
            continue
        if not found:
            continue
        each = [seen["tokens"] / seen["seconds"] for seen in found]
        rates[name] = statistics.median(each)
        first = [1e3 * value for seen in found for value in seen["first"]]
        between = [1e3 * value for seen in found for value in seen["between"]]
        waits = [f"{at(first, share):.0f}" for share in (0.5, 0.95, 0.99)]
        waits += [f"{at(between, share):.1f}" for share in (0.5, 0.95, 0.99)]
        ours = rates.get("mtnlg")
        ratio = f"{rates[name] / ours:.2f}" if ours else ""
        span = f"{min(each):.0f}-{max(each):.0f}"
        ready = f"{results.get(name, dtype, 'ready'):.1f}"
        yield f"| {name} | {rates[name]:.0f} | {span} | {ratio} | {' | '.join(waits)} | {ready} |"


def at(values: list[float], share: float) -> float:
    """A quantile, of the values themselves."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scratch = Path(tempfile.gettempdir()) / "mtnlg-bench-serve"
    numbers = sorted({work.clients for work in works().values()})
    parser.add_argument("--servers", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "float32"])
    parser.add_argument("--works", nargs="+", default=list(works()), choices=list(works()))
    parser.add_argument("--clients", nargs="+", type=int, default=numbers, choices=numbers)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", default=str(scratch), help="where the model's files are kept")
    parser.add_argument("--state", help="what has been measured; state.json in --folder if not given")
    parser.add_argument("--fresh", action="store_true", help="forget what has been measured")
    parser.add_argument("--output", default=str(RESULT))
    options = parser.parse_args()
    options.works = [name for name in options.works if works()[name].clients in options.clients]
    options.state = options.state or str(Path(options.folder) / "state.json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end with us
    results = Results(Path(options.state), options.fresh)
    measure(options, results)
    text = "\n".join(table(options, results))
    Path(options.output).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
