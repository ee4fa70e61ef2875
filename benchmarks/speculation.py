"""Speculative decoding: tokens per second with and without guesses, one request at a time.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --model runs/large --draft runs/small --prompts prompts.txt

Three parts, each with its contenders alternating over --rounds in one process on one thread; fastest
round in processor time, which busy neighbours disturb less than wall time.
  shape    a GPT-2-124M shape with random weights, greedy. An oracle knows what it will say and guesses
           each token right with a given chance: what the engine makes of guesses that good.
  n-gram   the same model, which like most untrained ones repeats itself: text as repetitive as can be.
  draft    --model with --draft, both trained, on --prompts (one a line), greedy and at temperature 1.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from mtnlg import MegatronLmModel
from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.generation import Engine, GenerationRequest, SamplingRules
from mtnlg.generation.scheduler import Draft, Running
from mtnlg.model import MegatronLmDecoder, initialize_weights

HERE = Path(__file__).resolve().parent
CLOCK = time.process_time  # on one thread, the wall time of a machine that has nothing else to do


class Oracle:
    """Guesses what will come, each token right with a given chance."""

    def __init__(self, answers: Sequence[Sequence[int]], chance: float, count: int) -> None:
        self.answers, self.chance, self.count = answers, chance, count
        self.random = random.Random(3)

    def draft(self, entries: Sequence[Running]) -> list[Draft]:
        found = []
        for entry in entries:
            place = len(entry.ids)
            known = next(list(ids) for ids in self.answers if list(ids[:place]) == entry.ids)
            guess = known[place : place + self.count]
            found.append(Draft([token if self.random.random() < self.chance else 0 for token in guess]))
        return found

    def forget(self, entry: Running) -> None:
        del entry


def measure(
    engines: dict[str, Engine], requests: Callable[[], list[GenerationRequest]], rounds: int
) -> list[str]:
    """A table row for each engine; the first is what the others are compared with."""
    fastest = dict.fromkeys(engines, float("inf"))
    tokens = dict.fromkeys(engines, 0)
    for number in range(rounds + 1):
        for name, engine in engines.items():
            began = CLOCK()
            found = [engine.submit(request).result() for request in requests()]
            if number:  # the first warms up
                tokens[name] = sum(len(one.new_ids) for one in found)
                fastest[name] = min(fastest[name], CLOCK() - began)
    rows, plain = [], None
    for name, engine in engines.items():
        speed = tokens[name] / fastest[name]
        plain = plain or speed
        counts = engine.statistics
        kept = f"{counts.accepted_tokens / counts.drafted_tokens:.0%}" if counts.drafted_tokens else ""
        per_step = counts.new_tokens / counts.steps
        rows.append(f"| {name} | {kept} | {per_step:.2f} | {speed:.1f} | {speed / plain:.2f} |")
        print(rows[-1], flush=True)
    return rows


def shape_rows(dtype: str, tokens: int, rounds: int) -> tuple[list[str], list[str]]:
    config = MegatronModelConfig.from_preset("gpt2")
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=1)
    model.eval()
    settings = dict(dtype=dtype, max_batch_size=1, prefix_cache=False, compile="off")
    prompt = [int(token) for token in torch.arange(128) * 379 % 50_000]

    def requests() -> list[GenerationRequest]:
        return [GenerationRequest(prompt, max_new_tokens=tokens)]

    plain = Engine(model, config=EngineConfig(**settings))
    answers = [plain.submit(request).result().ids for request in requests()]
    engines = {"no guesses": plain}
    for chance in (0.5, 0.8, 1.0):
        oracle = Oracle(answers, chance, 4)
        engines[f"4 guesses, each right with {chance:.0%}"] = Engine(
            model, config=EngineConfig(**settings), drafter=oracle
        )
    oracles = measure(engines, requests, rounds)
    ngrams = {"no guesses": Engine(model, config=EngineConfig(**settings))}
    for count in (4, 8):
        ngrams[f"n-gram, {count} tokens"] = Engine(
            model, config=EngineConfig(speculation="ngram", num_speculative_tokens=count, **settings)
        )
    return oracles, measure(ngrams, requests, rounds)


def trained_rows(
    model: Path, draft: Path | None, prompts: list[str], tokens: int, rounds: int
) -> list[str]:
    large = MegatronLmModel.from_pretrained(model)
    assert large.tokenizer is not None
    ids = [large.tokenizer.encode(prompt) for prompt in prompts]
    small = None if draft is None else MegatronLmModel.from_pretrained(draft)
    rows = []
    for name, rules in (("greedy", {}), ("temperature 1", {"temperature": 1.0, "top_p": 0.95})):

        def requests(rules: dict[str, float] = rules) -> list[GenerationRequest]:
            return [
                GenerationRequest(prompt, SamplingRules(seed=7, **rules), max_new_tokens=tokens)
                for prompt in ids
            ]

        settings = dict(max_batch_size=1, prefix_cache=False, compile="off")
        engines = {f"{name}, no guesses": Engine(large, config=EngineConfig(**settings))}
        engines[f"{name}, n-gram"] = Engine(large, config=EngineConfig(speculation="ngram", **settings))
        if small is not None:
            for count in (2, 4):
                config = EngineConfig(speculation="draft", num_speculative_tokens=count, **settings)
                engines[f"{name}, draft model, {count} tokens"] = Engine(
                    large, config=config, draft_model=small
                )
        rows += measure(engines, requests, rounds)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "speculation.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    head = "| contender | guesses kept | tokens a step | tokens/s | against none |\n"
    head += "|---|---:|---:|---:|---:|\n"
    oracles, ngrams = shape_rows(arguments.dtype, arguments.tokens, arguments.rounds)
    parts = [
        "# Speculative decoding",
        f"`python benchmarks/speculation.py`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, "
        f"one thread, torch {torch.__version__}, one request at a time.",
        f"## GPT-2 124M's shape, {arguments.dtype}: guesses of a given quality\n\n{head}"
        + "\n".join(oracles),
        "## The same, repeating itself: n-grams\n\n" + head + "\n".join(ngrams),
    ]
    if arguments.model is not None:
        prompts = ["The ", "春天", "def main(", "import "]
        if arguments.prompts is not None:
            prompts = arguments.prompts.read_text("utf-8").splitlines()
        rows = trained_rows(arguments.model, arguments.draft, prompts, arguments.tokens, arguments.rounds)
        about = f"`{arguments.model.name}` with `{arguments.draft.name if arguments.draft else '-'}`"
        parts.append(f"## Trained models: {about}\n\n{head}" + "\n".join(rows))
    arguments.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
