"""Training step on one GPU: tokens/s and MFU of 124M, 350M and 1.3B decoders in bf16 beside other projects.

    python benchmarks/train_step_gpu.py --output benchmarks/results/train_step_gpu.md   # half an hour
    python benchmarks/train_step_gpu.py --quick     # tiny; runs on a CPU too, to see that it runs

Each contender has a process and the GPU to itself. A batch that does not fit is halved until it does.
MFU counts the model's FLOPs, attention in full (arXiv 2104.04473), against the data sheet's dense rate
and against the best 8192³ product measured right before. Ours is profiled as well: the table says
what kinds of kernel the GPU spent its time in, and how long it waited for the host.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from peers import Shape, build  # noqa: E402
from train_step import cpu_name, timed  # noqa: E402

TOKENS = 16_384  # of a step
SHAPES = {  # vocabulary: GPT-2's, padded to a multiple of 64 as its users on GPUs do
    "124m": Shape(layers=12, hidden=768, heads=12, vocab=50304, sequence=1024, batch=16),
    "350m": Shape(layers=24, hidden=1024, heads=16, vocab=50304, sequence=1024, batch=16),
    "1.3b": Shape(layers=24, hidden=2048, heads=16, vocab=50304, sequence=1024, batch=16),
    "tiny": Shape(layers=2, hidden=64, heads=2, vocab=512, sequence=64, batch=4),
}
MODES = ("eager", "compile")
# By what is in a kernel's name, the first that fits; the rest is "other".
KINDS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "matmul", "::mm", "addmm", "_linear", "::bmm"),
    "attention": ("flash", "fmha", "cudnn_generated", "sdpa", "attention"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "copies": ("memcpy", "memset", "copy"),
    "norms, activations, loss": ("triton", "elementwise", "reduce", "softmax", "norm", "gelu", "::"),
}


def main() -> None:
    arguments = parse()
    if arguments.worker:
        serve(json.loads(arguments.worker), arguments)
        return
    lines: list[dict[str, Any]] = []
    for name in arguments.shapes:
        for sequence in arguments.sequences:
            shape = replace(SHAPES[name], sequence=sequence, batch=max(1, arguments.tokens // sequence))
            lines += [run(name, shape, peer, mode, arguments) for peer, mode in contenders(arguments)]
            text = report(lines, arguments)
            if arguments.output:
                Path(arguments.output).write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["124m", "350m", "1.3b"], choices=list(SHAPES))
    parser.add_argument("--sequences", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--peers", nargs="+", default=["mtnlg", "transformers", "nanogpt"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of one step")
    parser.add_argument("--steps", type=int, default=10, help="timed, after three that are not")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two steps")
    parser.add_argument("--output", help="also write the tables to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.sequences, arguments.tokens, arguments.steps = ["tiny"], [64], 256, 2
    return arguments


def contenders(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    return [(peer, mode) for peer in arguments.peers for mode in arguments.modes]


def run(name: str, shape: Shape, peer: str, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process of its own, with the largest batch that fits."""
    while True:
        task = {"peer": peer, "mode": mode, "shape": asdict(shape)}
        command = [sys.executable, __file__, "--worker", json.dumps(task), "--steps", str(arguments.steps)]
        log = None if os.environ.get("VERBOSE") else subprocess.DEVNULL
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
        answers = done.stdout.strip().splitlines()
        answer = json.loads(answers[-1]) if answers else {"error": f"ended with code {done.returncode}"}
        if not answer.get("out_of_memory") or shape.batch == 1:
            break
        shape = replace(shape, batch=shape.batch // 2)
    print(f"{name} {shape.sequence} {peer} {mode}: {answer}", file=sys.stderr, flush=True)
    return {"name": name, "shape": shape, "peer": peer, "mode": mode, **answer}


# The worker.


def serve(task: dict[str, Any], arguments: argparse.Namespace) -> None:
    import torch

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        answer = measure(task, Shape(**task["shape"]), device, arguments.steps)
    except torch.OutOfMemoryError:
        answer = {"error": "out of memory", "out_of_memory": True}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:200]}
    answers.write(json.dumps(answer) + "\n")


def measure(task: dict[str, Any], shape: Shape, device: str, steps: int) -> dict[str, Any]:
    import torch

    from mtnlg.training.peak import measure_peak

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    contender = build(task["peer"], shape, "bf16", device, torch.get_num_threads())
    step = contender.steps[task["mode"]]
    losses = [step() for _ in range(3)]
    rate = measure_peak(device, torch.bfloat16, 1.0)
    seconds = [timed(step, device)["seconds"] for _ in range(steps)]
    answer = {
        "seconds": statistics.median(seconds),
        "loss": losses[0],
        "rate": rate,
        "note": contender.note,
    }
    if device == "cuda":
        answer["gib"] = torch.cuda.max_memory_allocated() / 2**30
    if task["peer"] == "mtnlg":
        answer["profile"] = profiled(step, device)
    return answer


def profiled(step: Callable[[], float], device: str) -> dict[str, float]:
    """Seconds of one step by kind of kernel; on a GPU also those in which it ran none."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as trace:
        begin = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    found: dict[str, float] = {}
    for event in trace.key_averages():
        micros = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        kind = kind_of(event.key)
        found[kind] = found.get(kind, 0.0) + micros / 1e6
    if device == "cuda":
        found["waiting for the host"] = max(0.0, wall - sum(found.values()))
    return found


def kind_of(kernel: str) -> str:
    lowered = kernel.lower()
    for kind, marks in KINDS.items():
        if any(mark in lowered for mark in marks):
            return kind
    return "other"


# The report.


def report(lines: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    import torch

    from mtnlg.training.peak import listed_gpu_peak

    on_gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if on_gpu else cpu_name()
    listed = listed_gpu_peak(machine, torch.bfloat16) if on_gpu else None
    text = f"# Training step on {machine}\n\n"
    text += (
        f"{date.today()}, torch {torch.__version__}, bf16, medians of {arguments.steps} steps, forward, "
    )
    text += "backward, clipping and AdamW with float32 weights and state. "
    text += f"`python benchmarks/train_step_gpu.py{' --quick' * arguments.quick}`\n\n"
    text += f"Data sheet: {listed / 1e12:,.0f} TFLOP/s dense.\n\n" if listed else "No listed peak.\n\n"
    text += "| model | sequence × batch | | tokens/s | TFLOP/s | MFU, data sheet | of measured product "
    text += "| GiB | first loss |\n|---|---|---|---|---|---|---|---|---|\n"
    for line in lines:
        text += table_line(line, listed)
    return text + profile_table([line for line in lines if "profile" in line])


def table_line(line: dict[str, Any], listed: float | None) -> str:
    shape: Shape = line["shape"]
    label = f"| {line['name']} | {shape.sequence} × {shape.batch} | {line['peer']} {line['mode']} "
    if "error" in line:
        return label + f"| {line['error']} | | | | | |\n"
    rate = shape.tokens / line["seconds"]
    flops = rate * shape.flops_per_token
    share = f"{flops / listed:.1%}" if listed else "–"
    gib = f"{line['gib']:.1f}" if "gib" in line else "–"
    return (
        f"{label}| {rate:,.0f} | {flops / 1e12:,.1f} | {share} | {flops / line['rate']:.1%} "
        f"| {gib} | {line['loss']:.2f} |\n"
    )


def profile_table(lines: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    kinds = sorted({kind for line in lines for kind in line["profile"]})
    text = "\n## What our step's time goes into\n\n"
    text += f"| | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}\n"
    for line in lines:
        total = sum(line["profile"].values()) or 1.0
        shares = " | ".join(f"{line['profile'].get(kind, 0.0) / total:.0%}" for kind in kinds)
        text += f"| {line['name']} {line['shape'].sequence} {line['mode']} | {shares} |\n"
    return text


if __name__ == "__main__":
    main()
