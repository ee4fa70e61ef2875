"""What the generation engine costs beside the model: scheduling, choosing tokens, text, events.

    python benchmarks/engine.py
    python benchmarks/engine.py --batches 1 8 32 --dtypes bf16 --threads 2 --output results/engine.md

A GPT-2-124M shape of random weights answers requests of 128 prompt tokens; every request streams its text
through a trained byte-level tokenizer, with a stop string, and is drawn greedily, with top-p 0.95, or with
that, every penalty and 20 alternatives of each token. Only steps in which all requests generate are
counted. "The model" is the runner's forward pass; everything else is the engine: "tokens" is the choice of
tokens, "rest" all Python around it. ``int8`` and ``int4`` are weights, beside bf16.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mtnlg.config import MegatronModelConfig
from mtnlg.config.generation import EngineConfig
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.generation import Engine, GenerationRequest, SamplingRules
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.quantization import quantize_model
from mtnlg.tokens import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "gpt2": {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "tiny": {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
PROMPT = 128  # tokens
DRAWN: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 1}
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.2,
    "presence_penalty": 0.2,
    "no_repeat_ngram_size": 3,
}
ALL = "top-p, penalties, 20 logprobs"
RULES = {
    "greedy": SamplingRules(),
    "top-p": SamplingRules(**DRAWN),
    ALL: SamplingRules(**DRAWN, **PENALTIES),
}


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    text = report(arguments)
    if arguments.output:
        Path(arguments.output).write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--steps", type=int, default=48, help="counted steps of each row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", help="also write the table to this file")
    return parser.parse_args()


def make_decode() -> Callable[[list[int]], str]:
    """A real tokenizer's decode; ids it does not have become others that it has."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    tokenizer = Tokenizer.train(texts, vocab_size=2000)
    return lambda ids: tokenizer.decode([token % 2000 for token in ids])


def measure(
    model: MegatronLmDecoder,
    decode: Callable[[list[int]], str],
    dtype: str,
    batch: int,
    steps: int,
    rules: str,
) -> dict[str, float]:
    """Milliseconds of a step in which ``batch`` requests generate one token each."""
    config = EngineConfig(max_batch_size=batch, dtype=dtype, prefill_chunk=PROMPT * batch, compile="on")
    engine = Engine(model, decode, config)
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    found = [
        engine.submit(
            GenerationRequest(
                torch.randint(vocab, (PROMPT,), generator=generator).tolist(),
                RULES[rules],
                logprobs=20 if rules == ALL else None,
                max_new_tokens=steps + 16,
                stop=["\n\nno text has this"],
                stream=number,
            )
        )
        for number in range(batch)
    ]
    for generation in found:
        generation.listen(lambda event: None)
    for _ in range(8):  # prompts, and what happens once
        engine.step()
    counted = engine.statistics
    times = []
    for _ in range(steps):
        before = (counted.step_seconds, counted.model_seconds, counted.sampling_seconds)
        engine.step()
        after = (counted.step_seconds, counted.model_seconds, counted.sampling_seconds)
        times.append([1000 * (new - old) for new, old in zip(after, before)])
    assert counted.running == batch
    engine.close()
    step, in_model, tokens = (statistics.median(column) for column in zip(*times))
    rest = statistics.median(whole - part - chosen for whole, part, chosen in times)
    return {
        "step": step,
        "model": in_model,
        "tokens": tokens,
        "rest": rest,
        "share": (tokens + rest) / (in_model + tokens + rest),
        "speed": 1000 * batch / step,
    }


def in_dtype(model: MegatronLmDecoder, dtype: str) -> tuple[MegatronLmDecoder, str]:
    """The model with such weights, and the dtype that it computes in beside them."""
    if dtype not in ("int8", "int4"):
        return model, dtype
    config = QuantizeConfig(dtype, activations="int8", head="same")  # as benchmarks/generate.py has them
    return quantize_model(deepcopy(model), config), "bf16"


def report(arguments: argparse.Namespace) -> str:
    config = MegatronModelConfig(**SHAPES[arguments.shape], max_position_embeddings=1024)
    model = MegatronLmDecoder(config)
    initialize_weights(model, config, seed=1)
    model.eval()
    decode = make_decode()
    lines = [
        "# What the engine costs beside the model",
        "",
        f"{date.today()}, {platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"{arguments.shape} shape of random weights, prompt {PROMPT}, medians of {arguments.steps} steps, "
        f"load of the machine {os.getloadavg()[0]:.0f}. `python {' '.join(sys.argv)}`",
        "",
        "Milliseconds of a step; \"engine\" is the share of everything but the model.",
        "",
        "| dtype | requests | rules | step | model | tokens | rest | engine | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for dtype in arguments.dtypes:
        of_dtype, numbers = in_dtype(model, dtype)
        for batch in arguments.batches:
            for rules in RULES:
                found = measure(of_dtype, decode, numbers, batch, arguments.steps, rules)
                lines.append(
                    f"| {dtype} | {batch} | {rules} | {found['step']:.1f} | {found['model']:.1f} | "
                    f"{found['tokens']:.2f} | {found['rest']:.2f} | {found['share']:.1%} | "
                    f"{found['speed']:.0f} |"
                )
                print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
