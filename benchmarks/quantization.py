"""What few bits cost a trained model: size, perplexity on held-out text, agreement of greedy text.

    python benchmarks/quantization.py runs/demo

The run's own test split is the text; GPTQ and AWQ see its training split. Agreement is the share of greedy
tokens, of continuations of held-out text, up to the first that differs from the model in floating point.
Speed beside other projects is measured by ``benchmarks/generate.py``.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from mtnlg import MegatronLmModel
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.evaluation.texts import texts_of_run
from mtnlg.quantization import calibrate, quantized_linears, round_in_training
from mtnlg.training.saved_run import load_run

WINDOW, NEW, PROMPT = 256, 32, 32  # tokens
ROWS_OF_A_STEP = 8
DISTANCE_ROWS = 16
METHODS = ["rtn", "gptq", "awq"]
ROWS = [
    ("int8", dict(weights="int8")),
    ("int8, activations int8", dict(weights="int8", activations="int8")),
    ("float8", dict(weights="float8")),
    ("int4, groups of 32", dict(weights="int4")),
    ("int4, groups of 32, zero points", dict(weights="int4", symmetric=False)),
    ("int4, groups of 32, activations int8", dict(weights="int4", activations="int8")),
    ("int4, groups of 128", dict(weights="int4", group_size=128)),
    ("int4, whole rows", dict(weights="int4", group_size=0, head="same")),
]


@dataclass
class Text:
    """Token ids [rows, WINDOW] to learn from and to be measured on."""

    train: Tensor
    test: Tensor


def main() -> None:
    arguments = parse()
    model = MegatronLmModel.from_pretrained(arguments.run)
    assert model.tokenizer is not None
    config = load_run(Path(arguments.run))
    text = Text(*(rows_of(config, model.tokenizer, split) for split in ("train", "test")))
    text.test = text.test[: arguments.test_rows]
    answers, expected = greedy(model, text.test), said(model, text.test)
    base = perplexity(model, text.test)
    size = matrix_bytes(model)
    lines = heading(arguments, model, text)
    lines.append(f"| float32 | | {size / 1e6:.2f} | {base:.3f} | | | 100% |")
    print("\n".join(lines), flush=True)
    batches = list(text.train[spread(len(text.train), arguments.calibration_rows)].split(4))
    for name, fields in ROWS:
        for method in arguments.methods:
            quantized = copy.deepcopy(model)
            calibrate(quantized, QuantizeConfig.from_dict(fields), method, batches)
            lines.append(row(name, method, quantized, text.test, base, answers, expected))
            print(lines[-1], flush=True)
    lines += ["", *aware(arguments, model, text, batches)]
    Path(arguments.output).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--test-rows", type=int, default=64, help=f"windows of {WINDOW} tokens")
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument(
        "--steps", type=int, default=60, help=f"of quantization-aware training, {ROWS_OF_A_STEP} rows each"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--aware-group", type=int, default=0, help="inputs that share a scale; 0: the row")
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", default=str(here / "results" / "quantization.md"))
    return parser.parse_args()


def rows_of(config, tokenizer, split: str) -> Tensor:
    ids = [
        token
        for text in texts_of_run(config, tokenizer, split)
        for document in text.documents
        for token in document.ids.tolist()
    ]
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]


def spread(count: int, wanted: int) -> Tensor:
    return torch.arange(min(count, wanted))


@torch.no_grad()
def loss(model: MegatronLmModel, rows: Tensor) -> float:
    """Nats a token."""
    total = sum(float(model(part[:, :-1], part[:, 1:]).loss) for part in rows.split(8))
    return total / rows[:, 1:].numel()


def perplexity(model: MegatronLmModel, rows: Tensor) -> float:
    return math.exp(loss(model, rows))


@torch.no_grad()
def said(model: MegatronLmModel, rows: Tensor) -> Tensor:
    """Log probabilities of the next token [tokens, vocab]."""
    rows = rows[:DISTANCE_ROWS]
    return torch.cat([model(part).logits.float().log_softmax(-1).flatten(0, 1) for part in rows.split(8)])


def greedy(model: MegatronLmModel, rows: Tensor) -> list[list[int]]:
    prompts = rows[:32, :PROMPT].tolist()
    return [ids[PROMPT:] for ids in model.generate(prompts, max_new_tokens=NEW)]


def agreement(model: MegatronLmModel, rows: Tensor, answers: list[list[int]]) -> float:
    same = wanted = 0
    for found, expected in zip(greedy(model, rows), answers):
        wanted += len(expected)
        for one, other in zip(found, expected):
            if one != other:
                break
            same += 1
    return same / wanted


def matrix_bytes(model: MegatronLmModel) -> int:
    """Of the layers' matrices and the head."""
    quantized = quantized_linears(model)
    parts = [t for linear in quantized.values() for t in (linear.codes, linear.scales, linear.zeros)]
    parts += [m.weight for m in model.modules() if type(m) is torch.nn.Linear]
    return sum(part.nbytes for part in parts if part is not None)


def heading(arguments: argparse.Namespace, model: MegatronLmModel, text: Text) -> list[str]:
    return [
        "# Quantization: what it costs",
        "",
        f"{date.today()}, {processor()}, {os.cpu_count()} cores, torch {torch.__version__}. "
        f"`python benchmarks/quantization.py {' '.join(sys.argv[1:])}`",
        "",
        f"{model.num_parameters / 1e6:.1f}M parameters; {text.test.numel():,} tokens of the test split "
        f"in windows of {WINDOW}; GPTQ and AWQ saw {arguments.calibration_rows * WINDOW:,} tokens of its "
        f"training split. MB: matrices of the layers and the head. Distance: Kullback-Leibler divergence "
        f"of the next token's distribution from that of float32, nats a token, in {DISTANCE_ROWS} windows. "
        f"Agreement: 32 continuations of {PROMPT} tokens by {NEW}.",
        "",
        "| numbers | method | MB | perplexity | change | distance | greedy agreement |",
        "|---|---|---|---|---|---|---|",
    ]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    has_vnni = any("avx512_vnni" in line for line in lines if line.startswith("flags"))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} (AVX-512 VNNI)" if has_vnni else name


def row(name, method, model, rows, base, answers, expected) -> str:
    found = perplexity(model, rows)
    change, size = f"{(found / base - 1) * 100:+.2f}%", matrix_bytes(model) / 1e6
    share = agreement(model, rows, answers)
    apart = float((expected.exp() * (expected - said(model, rows))).sum(-1).mean())
    return f"| {name} | {method} | {size:.2f} | {found:.3f} | {change} | {apart:.5f} | {share * 100:.0f}% |"


def aware(arguments: argparse.Namespace, model: MegatronLmModel, text: Text, batches) -> list[str]:
    """Fine-tuning under the rounding beside fine-tuning and rounding afterwards, by every method."""
    config = QuantizeConfig("int4", arguments.aware_group, head="same")
    began = time.perf_counter()
    tuned, under = copy.deepcopy(model), copy.deepcopy(model)
    round_in_training(under, config)
    for one in (tuned, under):
        tune(one, text.train, arguments.steps, arguments.learning_rate)
    seconds = time.perf_counter() - began
    for module in under.modules():
        vars(module).pop("forward", None)
    base = loss(tuned, text.test)
    found = {method: loss(rounded(tuned, config, method, batches), text.test) for method in METHODS}
    learnt = loss(rounded(under, config, "rtn", batches), text.test)
    lost = found["rtn"] - base
    before, before_rounded = (loss(m, text.test) for m in (model, rounded(model, config, "rtn", batches)))

    def line(name: str, value: float) -> str:
        return f"| {name} | {value:.4f} | {value - base:+.4f} | {(1 - (value - base) / lost) * 100:.0f}% |"

    groups = f"groups of {config.group_size}" if config.group_size else "a scale for each whole row"
    return [
        f"## Quantization-aware fine-tuning, int4 with {groups}, the head too",
        "",
        f"{arguments.steps} steps of {ROWS_OF_A_STEP} windows at {arguments.learning_rate:g} (AdamW, "
        f"falling to nothing), {seconds:.0f} s for both trainings. Without tuning the model has "
        f"{before:.4f}, and rounded {before_rounded:.4f}. What rounding costs is what it adds to the same "
        "training without rounding.",
        "",
        "| | held-out loss, nats a token | cost | recovered |",
        "|---|---|---|---|",
        f"| tuned in floating point | {base:.4f} | | |",
        *(line(f"tuned in floating point, then {method}", value) for method, value in found.items()),
        line("tuned under the rounding, then rtn", learnt),
    ]


def rounded(model: MegatronLmModel, config: QuantizeConfig, method: str, batches) -> MegatronLmModel:
    """A copy in few bits."""
    found = copy.deepcopy(model)
    calibrate(found, config, method, batches)
    return found


def tune(model: MegatronLmModel, rows: Tensor, steps: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        first = ROWS_OF_A_STEP * step
        part = rows[torch.arange(first, first + ROWS_OF_A_STEP) % len(rows)]
        value = model(part[:, :-1], part[:, 1:]).loss / part[:, 1:].numel()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()


if __name__ == "__main__":
    main()
