"""Training steps on sequences of up to 131,072 tokens that ranks share, on the CPU.

    python benchmarks/long_context.py --output benchmarks/results/long_context.md
    python benchmarks/long_context.py --lengths 4096 --ranks 2 --method all_to_all    # seconds

The model is that of ``recipes/long-context.yaml``; each rank is a process of one thread over gloo. For
every length one step (forward, backward, AdamW) runs after a short one that wakes everything up. Bytes
sent are counted at torch's calls and stand beside the formula of ``mtnlg.parallel.context_costs``, which
then says what real models would keep and send.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mtnlg.config import LayoutConfig, MegatronModelConfig, OptimizerConfig, PrecisionConfig
from mtnlg.config.context_rules import context_problems
from mtnlg.config.load import load_run_config
from mtnlg.parallel import build_mesh, launch, lay_out
from mtnlg.parallel.context_costs import context_costs, tokens_that_hide_messages
from mtnlg.tokens.batch import Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.step import TrainingStep

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from train_step import cpu_name  # noqa: E402

RECIPE = HERE.parent / "recipes" / "long-context.yaml"
LENGTHS = (8_192, 32_768, 131_072)
PLANNED = (  # model, tensor-parallel size, ranks that share a sequence
    ("llama3-8b", 1, 8),
    ("llama3-8b", 8, 4),
    ("llama3-70b", 8, 8),
    ("gpt3-175b", 8, 4),
    ("gpt3-175b", 8, 8),
    ("mt-nlg-530b", 8, 16),
)
H100_FLOPS, INFINIBAND_BYTES = 989e12, 50e9  # a second: dense bf16, and a 400 Gb/s link for each GPU


def main() -> None:
    arguments = parse()
    layout = LayoutConfig(
        context_parallel_size=arguments.ranks,
        context_parallel_method=arguments.method,
        data_parallel_size=1,
    )
    config = load_run_config(RECIPE)
    found = launch(measure, layout, (layout, config.model, arguments.lengths), num_threads=1)
    text = report(config.model, layout, arguments.lengths, found)
    if arguments.output:
        Path(arguments.output).write_text(text, encoding="utf-8")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="TOKENS")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--method", choices=("ring", "all_to_all"), default="ring")
    parser.add_argument("--output", metavar="FILE")
    return parser.parse_args()


def measure(layout: LayoutConfig, model: MegatronModelConfig, lengths: list[int]) -> list[list[dict]]:
    """For each length what every rank measured in one step."""
    mesh = build_mesh(layout)
    laid_out = lay_out(model, mesh)
    optimizer_config = OptimizerConfig()
    optimizer = Optimizer(laid_out.named_parameters(), optimizer_config)
    step = TrainingStep(laid_out, optimizer, optimizer_config, LossScale(PrecisionConfig()), 0)
    sent = count_messages()
    found = []
    for length in (256, *lengths):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(0, model.vocab_size, (1, length + 1), generator=generator)
        batch = Batch(ids[:, :-1], ids[:, 1:])
        sent.clear()
        held, cpu = current_memory(), time.process_time()
        dist.barrier()
        begun = time.perf_counter()
        loss = step.run([batch], length, factor=1.0).loss
        mine = {
            "seconds": time.perf_counter() - begun,
            "cpu_seconds": time.process_time() - cpu,
            "held": held,
            "peak": peak_memory(),
            "sent": sum(sent),
            "messages": len(sent),
            "loss": loss,
        }
        everyone: list[Any] = [None] * mesh.num_ranks
        dist.all_gather_object(everyone, mine)
        found.append(everyone)
    return found[1:]


def count_messages() -> list[int]:
    """A list that grows by the bytes of every tensor this rank sends for attention."""
    sizes: list[int] = []
    batched, traded = dist.batch_isend_irecv, dist.all_to_all_single

    def batch_isend_irecv(operations: list[dist.P2POp]) -> Any:
        sizes.extend(item.tensor.nbytes for item in operations if item.op is dist.isend)
        return batched(operations)

    def all_to_all_single(received: torch.Tensor, given: torch.Tensor, group: Any) -> Any:
        size = dist.get_world_size(group)
        sizes.append(given.nbytes * (size - 1) // size)
        return traded(received, given, group=group)

    for function in (batch_isend_irecv, all_to_all_single):
        setattr(dist, function.__name__, function)
    return sizes


def current_memory() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory() -> int:
    """Most bytes of this process in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(
    model: MegatronModelConfig, layout: LayoutConfig, lengths: list[int], found: list[list[dict]]
) -> str:
    """Both tables in Markdown."""
    method = "ring" if layout.context_parallel_method == "ring" else "all-to-all"
    lines = [
        "# Long sequences",
        "",
        f"Measured {date.today():%Y-%m-%d} on {cpu_name()}, torch {torch.__version__}, by "
        f"`python benchmarks/long_context.py`. The model of `recipes/long-context.yaml` "
        f"({model.num_hidden_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} "
        f"heads), float32; each sequence is shared by {layout.context_parallel_size} ranks of one thread "
        f"({method} attention, gloo), so {os.cpu_count()} cores run {layout.context_parallel_size} ranks. "
        f"Load of the machine at the end of the run: {os.getloadavg()[0]:.0f}.",
        "",
        "One training step on one sequence. CPU seconds are those of the busiest and of the idlest rank; "
        "all ranks' together over the cores is how long the step takes where nothing else runs; memory is "
        "the most that any rank held, and how much of it came with the step. Scores alone would take "
        "sequence² numbers for each head: 64 GiB at 131,072 tokens.",
        "",
        "| tokens | seconds | CPU seconds of a rank | of all / cores | peak memory of a rank, MB "
        "| of the step, MB | sent by a rank, MB | by the formula, MB | messages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for length, ranks in zip(lengths, found):
        lines.append(measured_row(model, layout, length, ranks))
    return "\n".join([*lines, "", *planned_lines()]) + "\n"


def measured_row(model: MegatronModelConfig, layout: LayoutConfig, length: int, ranks: list[dict]) -> str:
    costs = context_costs(model, layout, length, number_bytes=4)
    formula = model.num_hidden_layers * (costs.sent_forward + costs.sent_backward)
    messages = model.num_hidden_layers * (costs.messages_forward + costs.messages_backward)
    for rank in ranks:
        assert (rank["sent"], rank["messages"]) == (formula, messages), (rank, formula, messages)
    cpu = [rank["cpu_seconds"] for rank in ranks]
    return (
        f"| {length:,} | {max(rank['seconds'] for rank in ranks):.1f} | {max(cpu):.1f}, {min(cpu):.1f} "
        f"| {sum(cpu) / (os.cpu_count() or 1):.1f} "
        f"| {max(rank['peak'] for rank in ranks) / 1e6:.0f} "
        f"| {max(rank['peak'] - rank['held'] for rank in ranks) / 1e6:.0f} "
        f"| {ranks[0]['sent'] / 1e6:.1f} | {formula / 1e6:.1f} | {messages} |"
    )


def planned_lines(length: int = LENGTHS[-1]) -> list[str]:
    """What real models would keep and send for one sequence, by the formulas."""
    lines = [
        f"## Planned: one sequence of {length:,} tokens, bf16",
        "",
        "By the formulas of `mtnlg.parallel.context_costs`, with sequence parallelism inside each tensor-"
        "parallel group. Kept: activations of all layers on one rank, without and with full recomputation. "
        "Sent: by one rank for one layer in the forward and in the backward pass. The last column is the "
        "tokens of a rank from which on a step of the ring hides its message, were attention to run at an "
        "H100's 989 TFLOP/s over links of 50 GB/s for each GPU; attention is slower, so fewer are enough.",
        "",
        "| model | tensor x context | tokens of a rank | kept, GB | recomputing, GB "
        "| ring sends, MB | all-to-all sends, MB | hides from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return lines + [planned_row(name, tensor, ranks, length) for name, tensor, ranks in PLANNED]


def planned_row(name: str, tensor: int, ranks: int, length: int) -> str:
    model = MegatronModelConfig.from_preset(name)
    ring = LayoutConfig(tensor_parallel_size=tensor, context_parallel_size=ranks, data_parallel_size=1)
    all_to_all = replace(ring, context_parallel_method="all_to_all")
    costs = context_costs(model, ring, length)
    traded = "does not divide the heads"
    if not context_problems(all_to_all, model, length):
        trades = context_costs(model, all_to_all, length)
        traded = f"{trades.sent_forward / 1e6:.0f} + {trades.sent_backward / 1e6:.0f}"
    layers = model.num_hidden_layers
    hides = tokens_that_hide_messages(model, H100_FLOPS, INFINIBAND_BYTES)
    return (
        f"| {name} | {tensor} x {ranks} | {length // ranks:,} | {layers * costs.kept / 1e9:.0f} "
        f"| {layers * costs.kept_recomputing / 1e9:.1f} "
        f"| {costs.sent_forward / 1e6:.0f} + {costs.sent_backward / 1e6:.0f} | {traded} | {hides:,.0f} |"
    )


if __name__ == "__main__":
    main()
