"""Training steps of parallel layouts on two cores, beside one process and beside megatron-core.

    python benchmarks/parallel.py --output benchmarks/results/parallel.md     # within 12 minutes
    python benchmarks/parallel.py --quick                                     # does it run? (a minute)

Every contender is a set of processes that are started once, one thread a rank; the single process has
two. They step in turn, one contender at a time while the others wait for a line of input, for
``--rounds`` rounds. All run the same micro-batches one after the other, add their gradients up, clip and
step AdamW. The table gives medians, and each contender's share of the single process of the same round.
The contenders of the larger shape do not fit into memory together: there each layout has its own rounds,
with a single process among its contenders.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from peers import Shape  # noqa: E402
from train_step import SHAPES, cpu_name  # noqa: E402

LAYOUTS = {"tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {"data": 2}}
PEERS = ("mtnlg", "megatron")
# Rows of a micro-batch: what a rank holds at once when the batch is divided.
BATCHES = {"small": (16, 4), "gpt2": (4, 4), "tiny": (4, 4)}  # sequences of a step, micro-batches
TINY = Shape(layers=2, hidden=64, heads=2, vocab=512, sequence=32, batch=4)


def main() -> None:
    arguments = parse()
    if arguments.worker:
        serve(arguments)
        return
    text = heading(arguments)
    for name in arguments.shapes:
        text += "\n" + measure(name, arguments)
        if arguments.output:
            Path(arguments.output).write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["small", "gpt2"], choices=list(BATCHES))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, nargs="+", default=[6, 3], help="of each shape")
    parser.add_argument("--micro-batches", type=int, help="other micro-batches of one step, of one row")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, one round")
    parser.add_argument("--output", help="also write the tables to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.rounds = ["tiny"], [1]
    return arguments


def shape_of(name: str, micro_batches: int | None) -> tuple[Shape, int]:
    """The shape with the batch of one step, and the micro-batches that it is cut into."""
    batch, count = BATCHES[name]
    if micro_batches:
        batch, count = batch // count * micro_batches, micro_batches
    return replace(TINY if name == "tiny" else SHAPES[name], batch=batch), count


# A rank: one process, told to step by lines of input.


def serve(arguments: argparse.Namespace) -> None:
    task = json.loads(arguments.worker)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with replies
    import torch
    import torch.distributed as dist

    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    rank, size = task["rank"], task["size"]
    shape, count = shape_of(task["shape"], task["micro_batches"])
    try:
        if size > 1 or task["peer"] == "megatron":
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
            store = dist.FileStore(task["store"], size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        module = importlib.import_module(f"peers.parallel_{task['peer']}")
        step = module.build(shape, task["sizes"], count)
        replies.write(json.dumps({"ready": True}) + "\n")
        for _ in sys.stdin:
            begin = time.process_time()
            loss = step()
            replies.write(json.dumps({"loss": loss, "processor": time.process_time() - begin}) + "\n")
    except Exception as error:
        replies.write(json.dumps({"error": f"{type(error).__name__}: {error}"[:300]}) + "\n")
        raise


# The driver.


class Contender:
    """One project in one layout: its ranks."""

    def __init__(self, peer: str, layout: str, shape: str, arguments: argparse.Namespace) -> None:
        self.peer, self.layout = peer, layout
        sizes = LAYOUTS.get(layout, {})
        size = math.prod(sizes.values())
        threads = 1 if size > 1 else 2
        self.folder = tempfile.TemporaryDirectory()
        task = {"peer": peer, "shape": shape, "sizes": sizes, "size": size, "threads": threads}
        task |= {"store": f"{self.folder.name}/store", "micro_batches": arguments.micro_batches}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        log = None if os.environ.get("VERBOSE") else subprocess.DEVNULL
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps({**task, "rank": rank})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
            for rank in range(size)
        ]
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.loss = math.nan
        self.error = ""

    def wait(self) -> None:
        """Until every rank has built its model."""
        self._answers()

    def step(self) -> float:
        """Seconds from the word to the last rank's answer."""
        begin = time.perf_counter()
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write("step\n")
            rank.stdin.flush()
        answers = self._answers()
        seconds = time.perf_counter() - begin
        if not self.error:
            self.processor.append(sum(answer["processor"] for answer in answers))
            if math.isnan(self.loss):
                self.loss = max(answer["loss"] for answer in answers)
        return seconds

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank in self.ranks:
            assert rank.stdout is not None
            line = rank.stdout.readline()
            answers.append(json.loads(line) if line else {"error": "ended without an answer"})
            if "error" in answers[-1]:  # the other ranks may wait for this one for ever
                self.error = answers[-1]["error"]
                self.close()
                break
        return answers

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()
        self.folder.cleanup()


def measure(name: str, arguments: argparse.Namespace) -> str:
    """Step contenders in turn, as many as fit into memory, and table the results."""
    shape, count = shape_of(name, arguments.micro_batches)
    rounds = dict(zip(arguments.shapes, arguments.rounds)).get(name, arguments.rounds[-1])
    together = [[layout] for layout in arguments.layouts] if name == "gpt2" else [arguments.layouts]
    text = f"## {name}: {shape.layers} × {shape.hidden}, vocabulary {shape.vocab}, "
    text += f"sequence {shape.sequence}, {count} micro-batches of {shape.batch // count}\n\n"
    text += f"Medians of {rounds} rounds.\n\n"
    text += "| | tokens/s | of one process | slowest–fastest | tokens per processor second | first loss |\n"
    text += "|---|---|---|---|---|---|\n"
    for layouts in together:
        text += rows(shape, take_turns(name, layouts, rounds, arguments))
    return text


def take_turns(
    name: str, layouts: list[str], rounds: int, arguments: argparse.Namespace
) -> list[Contender]:
    """The single process and all peers in these layouts, each stepped ``rounds`` times."""
    say(f"{name}: starting {' '.join(layouts)}")
    contenders = [Contender("mtnlg", "one process", name, arguments)]
    contenders += [
        Contender(peer, layout, name, arguments) for layout in layouts for peer in arguments.peers
    ]
    for contender in contenders:  # they build side by side, and step only in turn
        contender.wait()
    for contender in contenders:
        if not contender.error:
            first = contender.step()  # allocates; not counted
            say(f"  {contender.peer} {contender.layout}: {first:.2f} s, loss {contender.loss:.3f}")
        contender.processor.clear()
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            if not contender.error:
                contender.seconds.append(contender.step())
        say(f"  round {number + 1} of {rounds}")
    for contender in contenders:
        contender.close()
    return contenders


def rows(shape: Shape, contenders: list[Contender]) -> str:
    text = ""
    for contender in contenders:
        label = f"{contender.peer} {contender.layout}"
        if contender.error or not contender.seconds:
            text += f"| {label} | cannot: {contender.error} | | | | |\n"
            continue
        rates = [shape.tokens / seconds for seconds in contender.seconds]
        shares = [base / mine for base, mine in zip(contenders[0].seconds, contender.seconds)]
        text += f"| {label} | {statistics.median(rates):,.0f} | {statistics.median(shares):.0%} "
        text += f"| {min(rates):,.0f}–{max(rates):,.0f} "
        text += f"| {shape.tokens / statistics.median(contender.processor):,.0f} | {contender.loss:.3f} |\n"
    return text


def heading(arguments: argparse.Namespace) -> str:
    import torch

    command = "python benchmarks/parallel.py" + " --quick" * arguments.quick
    return (
        "# Parallel layouts, tokens/s\n\n"
        f"{date.today()}, {cpu_name()}, torch {torch.__version__}, megatron-core {megatron_version()}, "
        f"float32, gloo. One process has two threads, every rank one. `{command}`\n\n"
        "A pipeline of 2 stages and m micro-batches idles for 1/(m + 1) of a step: pp2 can reach "
        "m/(m + 1) of one process at best.\n"
    )


def megatron_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return "(not installed)"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
