"""What choosing the next tokens costs beside the model: every rule, many rows, a large vocabulary.

    python benchmarks/sampling.py
    python benchmarks/sampling.py --vocab 8192 --rows 1 8 --threads 1 --output sampling.md

The logits are those of a trained model in shape (peaked: a few likely tokens and a long tail) or those of
random weights (flat: thousands of tokens about equally likely, the worst case of top-p). Sequences hold
512 tokens (``--length``), which the penalties look at. Beside it, where it has the rules, what
transformers' processors take for the same logits. Times are medians; the contenders alternate.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtnlg.generation.draws import load_kernels
from mtnlg.generation.sampler import SamplingState, sample
from mtnlg.generation.sampling import SamplingRules, stream_of

RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-k 50, top-p 0.95": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "typical 0.9": {"temperature": 0.8, "typical_p": 0.9},
    "greedy, repetition 1.1": {"repetition_penalty": 1.1},
    "greedy, no repeat of 3": {"no_repeat_ngram_size": 3},
    "top-p 0.95, all penalties": {
        "temperature": 0.8,
        "top_p": 0.95,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.2,
        "no_repeat_ngram_size": 3,
    },
    "greedy, bias of 300 tokens": {"logit_bias": tuple((7 * place, 1.0) for place in range(300))},
    "greedy, 20 logprobs": {"logprobs": 20},
    "top-p 0.95, 20 logprobs": {"temperature": 0.8, "top_p": 0.95, "logprobs": 20},
}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    load_kernels()
    text = report(arguments)
    if arguments.output:
        Path(arguments.output).write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=512, help="tokens of each sequence")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", help="also write the tables to this file")
    return parser.parse_args()


def make_logits(kind: str, rows: int, vocab: int) -> Tensor:
    """[rows, vocab]: Zipf's law with some noise, or almost the same for every token."""
    torch.manual_seed(rows)
    noise = torch.randn(rows, vocab)
    if kind == "flat":
        return noise * 0.5
    ranks = torch.stack([torch.randperm(vocab) for _ in range(rows)]) + 1.0
    return noise - 1.3 * ranks.log()


def make_states(options: dict[str, Any], rows: int, vocab: int, length: int) -> list[SamplingState]:
    options = dict(options)
    logprobs = options.pop("logprobs", None)
    rules = SamplingRules(**options, seed=1)
    prompts = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(2)).tolist()
    states = [
        SamplingState(rules, prompt[: length // 2], stream_of(1, row), num_logprobs=logprobs)
        for row, prompt in enumerate(prompts)
    ]
    for state, prompt in zip(states, prompts):
        for token in prompt[length // 2 :]:
            state.accept(token)
    return states


def transformers_choice(
    options: dict[str, Any], states: list[SamplingState]
) -> Callable[[Tensor], object] | None:
    """The same rules by transformers' processors; ``None`` where it lacks one."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as made

    makers = {
        "repetition_penalty": made.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": made.NoRepeatNGramLogitsProcessor,
        "temperature": made.TemperatureLogitsWarper,
        "top_k": made.TopKLogitsWarper,
        "top_p": made.TopPLogitsWarper,
        "min_p": made.MinPLogitsWarper,
        "typical_p": made.TypicalLogitsWarper,
    }
    if set(options) - set(makers):
        return None
    processors = LogitsProcessorList(
        [make(options[name]) for name, make in makers.items() if name in options]
    )
    ids = torch.tensor([[*state.prompt_ids, *state.new_ids] for state in states])

    def choose(logits: Tensor) -> object:
        scores = processors(ids, logits)
        if "temperature" in options:
            return torch.multinomial(scores.softmax(dim=-1), 1)
        return scores.argmax(dim=-1)

    return choose


def measure(
    contenders: dict[str, Callable[[Tensor], object]], logits: Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of each; they take turns, and stop early where one takes long.

    Before each turn the logits are written anew and memory is read that fills the caches, as the
    model's step does.
    """
    weights, own = torch.ones(16 * 2**20), torch.empty_like(logits)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, run in contenders.items():
            if len(taken[name]) >= 3 and sum(taken[name]) > 1.0:
                continue
            weights.sum()
            own.copy_(logits)
            began = time.perf_counter()
            run(own)
            if number >= 2:
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def table(kind: str, arguments: argparse.Namespace) -> list[str]:
    head = [f"{rows} rows" for rows in arguments.rows]
    lines = [f"\n## {kind.capitalize()} logits, ms of each step (transformers in brackets)\n"]
    lines += ["| rules | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, options in RULES.items():
        cells = []
        for rows in arguments.rows:
            logits = make_logits(kind, rows, arguments.vocab)
            states = make_states(options, rows, arguments.vocab, arguments.length)
            contenders: dict[str, Callable[[Tensor], object]] = {"ours": partial(sample, states=states)}
            theirs = transformers_choice(options, states)
            if theirs is not None:
                contenders["theirs"] = theirs
            found = {
                key: 1e3 * value for key, value in measure(contenders, logits, arguments.rounds).items()
            }
            cells.append(
                f"{found['ours']:.2f}" + (f" ({found['theirs']:.1f})" if "theirs" in found else "")
            )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def report(arguments: argparse.Namespace) -> str:
    import transformers

    lines = [
        f"# Choosing tokens: {arguments.vocab:,} of vocabulary\n",
        f"{date.today()}, {machine()}, threads: {arguments.threads}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, sequences of {arguments.length} tokens, medians of up "
        f"to {arguments.rounds} alternating rounds, load of the machine {os.getloadavg()[0]:.0f}. "
        f"`python {' '.join(sys.argv)}`",
    ]
    for kind in ("peaked", "flat"):
        lines += table(kind, arguments)
    return "\n".join(lines) + "\n"


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
