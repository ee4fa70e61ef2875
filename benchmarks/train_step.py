"""Training step (forward, backward, clipping, AdamW) beside other projects, alternating in one run.

    python benchmarks/train_step.py                          # all rows, eager and compiled
    python benchmarks/train_step.py --rows small-bf16 --rounds 5 --modes eager
    python benchmarks/train_step.py --device cuda --rows gpt2-bf16 --batch 32 --sequence 1024

Each contender lives in a process of its own with the same number of threads, as its users start it.
One at a time runs a step, in turn, for ``--rounds`` rounds; the table gives medians. The limit is what
the model's FLOPs would take at the rate of plain matrix products of the same dtype, measured before
every round in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from peers import PEERS, Shape, build  # noqa: E402

SHAPES = {
    "small": Shape(layers=6, hidden=384, heads=6, vocab=8192, sequence=256, batch=16),
    "gpt2": Shape(layers=12, hidden=768, heads=12, vocab=50257, sequence=512, batch=4),
}
ROWS = ("small-float32", "small-bf16", "gpt2-float32", "gpt2-bf16")
MODES = ("eager", "compile")


def main() -> None:
    arguments = parse()
    if arguments.worker:
        serve(arguments)
        return
    tables = []
    for row in arguments.rows:
        tables.append(measure(row, arguments))
        text = report(tables, arguments)
        if arguments.output:
            Path(arguments.output).write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="SHAPE-PRECISION")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="another batch size")
    parser.add_argument("--sequence", type=int, help="another sequence length")
    parser.add_argument("--output", help="also write the tables to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def shape_of(row: str, arguments: argparse.Namespace) -> tuple[Shape, str]:
    name, precision = row.split("-")
    changes = {key: getattr(arguments, key) for key in ("batch", "sequence") if getattr(arguments, key)}
    return replace(SHAPES[name], **changes), precision


# The worker: one contender in one process, told what to do by lines of JSON.


def serve(arguments: argparse.Namespace) -> None:
    import torch

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with replies
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape, precision = shape_of(arguments.rows[0], arguments)
    try:
        contender = build(arguments.worker, shape, precision, arguments.device, arguments.threads)
    except ModuleNotFoundError as error:
        replies.write(json.dumps({"error": f"not installed ({error.name})"}) + "\n")
        return
    except Exception as error:
        replies.write(json.dumps({"error": f"failed: {type(error).__name__}: {error}"[:200]}) + "\n")
        raise
    modes = [mode for mode in arguments.modes if mode in contender.steps]
    replies.write(
        json.dumps({"modes": modes, "parameters": contender.num_parameters, "note": contender.note}) + "\n"
    )
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = timed(contender.steps[line.strip()], arguments.device)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        replies.write(json.dumps(answer) + "\n")


def timed(step: Any, device: str) -> dict[str, Any]:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    begin, processor = time.perf_counter(), time.process_time()
    loss = step()
    wait()
    return {
        "seconds": time.perf_counter() - begin,
        "processor": time.process_time() - processor,
        "loss": loss,
    }


# The driver.


class Worker:
    """A contender's process."""

    def __init__(self, peer: str, row: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", peer, "--rows", row, "--modes", *arguments.modes]
        command += ["--threads", str(arguments.threads), "--device", arguments.device]
        for key in ("batch", "sequence"):
            if getattr(arguments, key):
                command += [f"--{key}", str(getattr(arguments, key))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        log = None if os.environ.get("VERBOSE") else subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self.peer = peer
        self.about: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it has built its model."""
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": "ended without an answer"}

    def run(self, mode: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(mode + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    shape, precision = shape_of(row, arguments)
    say(f"{row}: starting")
    workers = [Worker(peer, row, arguments) for peer in arguments.peers]
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for worker in workers:  # they build side by side, and run only in turn
        worker.wait()
    for worker in workers:
        for mode in worker.about.get("modes", []):
            first = worker.run(mode)  # compiles, allocates; not counted
            say(f"  {worker.peer} {mode}: {first}")
            lines[worker.peer, mode] = {"first": first, "seconds": [], "processor": []}
        if "error" in worker.about:
            lines[worker.peer, ""] = {"first": worker.about, "seconds": [], "processor": []}
    peaks = []
    for number in range(arguments.rounds):
        peaks.append(matmul_rate(precision, arguments))
        for worker in workers:
            for mode in worker.about.get("modes", []):
                line = lines[worker.peer, mode]
                if "error" not in line["first"]:
                    answer = worker.run(mode)
                    line["seconds"].append(answer["seconds"])
                    line["processor"].append(answer["processor"])
        say(f"  round {number + 1} of {arguments.rounds}")
    for worker in workers:
        worker.close()
    about = {worker.peer: worker.about for worker in workers}
    return {"row": row, "shape": shape, "lines": lines, "about": about, "peak": max(peaks), "peaks": peaks}


def matmul_rate(precision: str, arguments: argparse.Namespace) -> float:
    """FLOP/s of the best of some matrix products."""
    import torch

    torch.set_num_threads(arguments.threads)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    best = 0.0
    sizes = [(2048, 768, 3072), (2048, 2048, 2048)] if arguments.device == "cpu" else [(8192, 8192, 8192)]
    for rows, inner, columns in sizes:
        left = torch.randn(rows, inner, device=arguments.device).to(dtype)
        right = torch.randn(inner, columns, device=arguments.device).to(dtype)
        for _ in range(8):
            seconds = timed(lambda a=left, b=right: a @ b, arguments.device)["seconds"]
            best = max(best, 2.0 * rows * inner * columns / seconds)
    return best


def report(tables: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    import torch

    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    text = "# Training step, tokens/s\n\n"
    text += f"{date.today()}, {machine}, {arguments.threads} threads, torch {torch.__version__}, "
    text += f"medians of {arguments.rounds} alternating rounds. `python benchmarks/train_step.py`\n"
    for table in tables:
        text += "\n" + table_text(table)
    return text


def table_text(table: dict[str, Any]) -> str:
    shape: Shape = table["shape"]
    limit = table["peak"] / shape.flops_per_token
    text = f"## {table['row']}: {shape.layers} × {shape.hidden}, vocabulary {shape.vocab}, "
    text += f"sequence {shape.sequence}, batch {shape.batch}\n\n"
    text += f"Limit {limit:,.0f} tokens/s ({table['peak'] / 1e9:,.0f} GFLOP/s in plain products).\n\n"
    text += "| | tokens/s | of the limit | slowest–fastest | tokens per processor second "
    text += "| parameters | first loss |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for (peer, mode), line in table["lines"].items():
        text += line_text(peer, mode, line, table, limit)
    notes = [f"{peer}: {about['note']}." for peer, about in table["about"].items() if about.get("note")]
    return text + ("\n" + " ".join(notes) + "\n" if notes else "")


def line_text(peer: str, mode: str, line: dict[str, Any], table: dict[str, Any], limit: float) -> str:
    shape: Shape = table["shape"]
    if not line["seconds"]:
        return f"| {peer} {mode} | {line['first'].get('error', 'no rounds')} | | | | | |\n"
    rates = [shape.tokens / seconds for seconds in line["seconds"]]
    rate = statistics.median(rates)
    per_processor = shape.tokens / statistics.median(line["processor"])
    parameters = table["about"][peer]["parameters"]
    loss = line["first"]["loss"]
    trained_before = mode != table["about"][peer]["modes"][0]  # modes may share weights
    doubt = "" if trained_before or abs(loss - math.log(shape.vocab)) < 0.5 else " (not ln V!)"
    odd = "" if abs(parameters - shape.num_parameters) <= 0.01 * shape.num_parameters else " (differs!)"
    text = f"| {peer} {mode} | {rate:,.0f} | {rate / limit:.0%} | {min(rates):,.0f}–{max(rates):,.0f} "
    return text + f"| {per_processor:,.0f} | {parameters:,}{odd} | {loss:.2f}{doubt} |\n"


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
