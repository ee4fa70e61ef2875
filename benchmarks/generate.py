"""Greedy generation beside other projects, alternating in one run, on random weights of one shape.

    python benchmarks/generate.py --llama-python ~/llama/bin/python
    python benchmarks/generate.py --rows mtnlg-bf16 llama.cpp-bf16 --batches 1 --rounds 5

GPT-2 with 124M parameters, prompts of 128 random tokens, 128 new ones, batch 1 and 8. Each contender
has a process of its own with the same number of threads and is idle while another runs. Times hold the
whole answer, reading the prompt included. llama.cpp runs under the Python given by ``--llama-python``,
an environment with ``pip install llama-cpp-python gguf``; peers that are missing are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VOCABULARY = 50257
ROWS = [
    *("mtnlg-float32", "llama.cpp-float32", "ctranslate2-float32", "transformers-float32"),
    *("mtnlg-bf16", "llama.cpp-bf16", "transformers-bf16"),
    *("mtnlg-int8", "llama.cpp-q8_0", "ctranslate2-int8", "mtnlg-int4", "llama.cpp-q4_0"),
]


@dataclass
class Contender:
    """One peer in one precision, in a process of its own.

    Args:
        name: row of the table.
        process: answers one line with one line.
        version: of the peer.
        seconds: by batch size, of each round.
        first_seconds: until the first tokens, where the peer tells.
        ids: what it answered in the first round, by batch size.
    """

    name: str
    process: subprocess.Popen[str]
    version: str = ""
    seconds: dict[int, list[float]] = field(default_factory=dict)
    first_seconds: dict[int, list[float]] = field(default_factory=dict)
    ids: dict[int, list[list[int]]] = field(default_factory=dict)

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """Let it run once."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: run it alone to see why.")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def measure(self, batch: int, new: int, prompts: list[list[int]]) -> None:
        """One round."""
        answer = self.ask({"prompts": prompts[:batch], "new": new})
        if any(len(ids) != new for ids in answer["ids"]):
            raise RuntimeError(f"{self.name} gave {[len(ids) for ids in answer['ids']]} tokens, not {new}.")
        self.seconds.setdefault(batch, []).append(answer["seconds"])
        if answer["first_seconds"]:
            self.first_seconds.setdefault(batch, []).append(answer["first_seconds"])
        self.ids.setdefault(batch, answer["ids"])


def main() -> None:
    arguments = parse()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="generate-"))
    make_folder(folder / "gpt2")
    contenders, missing = start(arguments, folder)
    generator = random.Random(1)
    prompts = [
        [generator.randrange(VOCABULARY) for _ in range(arguments.prompt)]
        for _ in range(max(arguments.batches))
    ]
    for contender in contenders:
        for batch in arguments.batches:
            contender.ask({"prompts": prompts[:batch], "new": 8})  # memory, kernels, threads
    for number in range(arguments.rounds):
        for batch in arguments.batches:
            for contender in contenders:
                contender.measure(batch, arguments.new, prompts)
                time.sleep(arguments.pause)
        text = report(arguments, number + 1, contenders, missing)
        if arguments.output:
            Path(arguments.output).write_text(text)
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    for contender in contenders:
        contender.process.kill()
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="PEER-PRECISION")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two contenders")
    parser.add_argument(
        "--llama-python", default=sys.executable, help="Python with llama-cpp-python and gguf"
    )
    parser.add_argument("--folder", help="where the models go; kept and used again")
    parser.add_argument("--output", default=str(HERE / "results" / "generate.md"))
    return parser.parse_args()


def make_folder(folder: Path) -> None:
    """A Hugging Face folder with random weights and made-up words; the weights for numpy as well."""
    if (folder / "weights.npz").is_file():
        return
    import numpy
    import torch
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    # Wider than GPT-2 begins, so that the most likely token stands out from the others.
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.05, eos_token_id=None, bos_token_id=None))
    model.save_pretrained(folder)
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t0", eos_token="t0"
    ).save_pretrained(folder)
    named = {
        name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    numpy.savez(folder / "weights.npz", **named)


def start(arguments: argparse.Namespace, folder: Path) -> tuple[list[Contender], dict[str, str]]:
    """All contenders, ready; those that are missing and the last thing they said."""
    contenders, missing = [], {}
    for name in arguments.rows:
        peer, _, precision = name.rpartition("-")
        try:
            contenders.append(
                start_one(name, command(arguments, folder, peer, precision), arguments.threads)
            )
        except (RuntimeError, subprocess.CalledProcessError) as error:
            missing[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    return contenders, missing


def command(arguments: argparse.Namespace, folder: Path, peer: str, precision: str) -> list[str]:
    threads = str(arguments.threads)
    if peer != "llama.cpp":
        program = str(HERE / "peers" / "generate_here.py")
        return [sys.executable, program, peer, str(folder / "gpt2"), precision, threads]
    program, model = str(HERE / "peers" / "generate_llama.py"), folder / f"{precision}.gguf"
    if not model.is_file():
        weights = str(folder / "gpt2" / "weights.npz")
        subprocess.run(
            [arguments.llama_python, program, "convert", weights, str(model), precision], check=True
        )
    return [arguments.llama_python, program, "serve", str(model), threads]


def start_one(name: str, words: list[str], threads: int) -> Contender:
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        process.wait()
        said.seek(0)
        raise RuntimeError((said.read() or "it ended").strip().splitlines()[-1])
    return Contender(name, process, str(json.loads(line)["ready"]))


def report(
    arguments: argparse.Namespace, rounds: int, contenders: list[Contender], missing: dict[str, str]
) -> str:
    import torch

    versions = {}
    for contender in contenders:
        versions[contender.name.rpartition("-")[0]] = contender.version
    lines = [
        "# Generation, tokens/s",
        "",
        f"{date.today()}, {processor()}, {os.cpu_count()} cores, {arguments.threads} threads, torch "
        f"{torch.__version__}, medians of {rounds} alternating rounds. "
        "`python benchmarks/generate.py`",
        "",
        f"Load average at the end: {os.getloadavg()[0]:.1f}. Where it is far above the number of cores, "
        "other work was running: compare within a table, and do not quote the rates.",
        "",
        ", ".join(f"{peer} {version}" for peer, version in versions.items()) + ".",
        "",
        f"GPT-2 124M, random weights, prompts of {arguments.prompt} tokens, {arguments.new} new ones, "
        "greedy. New tokens of all sequences together, divided by the time of the whole answer "
        "(prompts included).",
        "",
    ]
    for batch in arguments.batches:
        lines += table(batch, arguments.new, contenders)
    lines += [f"{name} is left out: {reason}" for name, reason in missing.items()]
    return "\n".join(lines).rstrip() + "\n"


def table(batch: int, new: int, contenders: list[Contender]) -> list[str]:
    lines = [
        f"## Batch {batch}",
        "",
        "| | tokens/s | slowest–fastest | llama.cpp's is 1 | first tokens, ms | as mtnlg's |",
        "|---|---|---|---|---|---|",
    ]
    rates = {one.name: [batch * new / seconds for seconds in one.seconds[batch]] for one in contenders}
    answers = {one.name: one.ids[batch] for one in contenders}
    for one in contenders:
        precision = one.name.rpartition("-")[2]
        mine, theirs = rates[one.name], rates.get(f"llama.cpp-{precision}")
        # Of the same round: what the machine does besides then slows both.
        share = "" if theirs is None else f"{statistics.median(a / b for a, b in zip(mine, theirs)):.2f}"
        first = one.first_seconds.get(batch)
        first_text = f"{1000 * statistics.median(first):,.0f}" if first else ""
        reference = answers.get(f"mtnlg-{precision}")
        same = "" if reference is None else f"{equal_start(answers[one.name], reference):.0%}"
        lines.append(
            f"| {one.name} | {statistics.median(mine):,.0f} | {min(mine):,.0f}–{max(mine):,.0f} | {share} "
            f"| {first_text} | {same} |"
        )
    return [*lines, ""]


def equal_start(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    equal = 0
    for mine, theirs in zip(found, expected):
        differs = [index for index, (a, b) in enumerate(zip(mine, theirs)) if a != b]
        equal += differs[0] if differs else len(mine)
    return equal / sum(map(len, expected))


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
