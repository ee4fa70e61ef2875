"""Activation memory of one layer, measured on real ranks, beside Korthikanti et al. (arXiv 2205.05198).

    python benchmarks/memory.py --output benchmarks/results/activation_memory.md

Every number is counted, not sampled: all memory that a layer's forward pass makes and that is still
there when it is over. Nothing depends on how busy the machine is. Ranks are processes on this machine
(gloo, CPU), float32, no dropout.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from train_step import cpu_name

from mtnlg.config import LayoutConfig, MegatronModelConfig, TrainingConfig
from mtnlg.parallel import build_mesh, launch
from mtnlg.parallel.activation_budget import FULL, Level
from mtnlg.parallel.activation_memory import (
    LayerShape,
    korthikanti,
    layer_bytes,
    measure_layers,
    measure_on_rank,
)

BATCH, SEQUENCE, HIDDEN, HEADS = 2, 1024, 512, 8


@dataclass(frozen=True)
class Row:
    """One way to keep less.

    Args:
        name: in the table.
        level: operators that are computed again.
        paper: the paper's name for it; empty where it has none.
    """

    name: str
    level: Level
    paper: str = ""

    @property
    def switches(self) -> TrainingConfig:
        """What asks for it."""
        if self.level == FULL:
            return TrainingConfig(activation_recomputation="full")
        if not self.level:
            return TrainingConfig()
        return TrainingConfig(activation_recomputation="operators", recomputed_operators=sorted(self.level))


ROWS = [
    Row("none", frozenset(), "none"),
    Row("normalization", frozenset(["normalization"])),
    Row("normalization, activation", frozenset(["normalization", "activation"])),
    Row("selective (attention)", frozenset(["attention"]), "selective"),
    Row("attention, normalization", frozenset(["attention", "normalization"])),
    Row("attention, normalization, activation", frozenset(["attention", "normalization", "activation"])),
    Row("all operators", frozenset(["attention", "normalization", "activation", "linear"])),
    Row("full", FULL, "full"),
]
LAYOUTS = [(1, True), (2, False), (2, True), (4, False), (4, True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", help="also write the tables to this file")
    arguments = parser.parse_args()
    text = introduction()
    for tensor, sequence_parallel in LAYOUTS:
        text += layout_table(tensor, sequence_parallel)
        print(f"{tensor} ranks, sequence parallel: {sequence_parallel}", file=sys.stderr, flush=True)
        write(text, arguments.output)
    text += budget_table()
    write(text, arguments.output)
    print(text)


def write(text: str, output: str | None) -> None:
    if output:
        Path(output).write_text(text)


def config() -> MegatronModelConfig:
    return MegatronModelConfig(
        vocab_size=512,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        max_position_embeddings=SEQUENCE,
        activation_function="gelu",
        tie_word_embeddings=True,
    )


def introduction() -> str:
    return f"""# Activation memory of one layer

{date.today()}, {cpu_name()}, torch {torch.__version__}, gloo ranks. `python benchmarks/memory.py`

GPT layer, hidden size {HIDDEN}, {HEADS} heads, sequence {SEQUENCE}, micro-batch {BATCH}, no dropout.
Measured: bytes that one layer's forward pass leaves for its backward pass on one rank, in float32,
counted to the byte. Formula: ours (`mtnlg.parallel.activation_memory.layer_bytes`), which the tests
hold the measurement to. In 16 bits: our formula for 2-byte activations and a fused attention kernel,
as on a GPU, beside the paper's (s tokens, b sequences, h hidden, a heads, t ranks): none
sbh(34 + 5as/h), with tensor parallelism sbh(10 + 24/t + 5as/(ht)), with sequence parallelism
sbh(34 + 5as/h)/t; selective without the 5as/h; full 2sbh.

Where ours differ from the paper's, and why:

- No dropout, so none of its masks (2sbh on the residual stream, as²b in attention) and no dropped
  copy of the attention weights (2as²b).
- Attention weights: the paper keeps them whole (2as²b). A CPU's kernel keeps those under the diagonal,
  in blocks of 128 queries (in float32 about 2as²b too, and none beyond 128 MB a layer); a GPU's fused
  kernel keeps none: there `selective` has nothing left to forget.
- With sequence parallelism the paper keeps each rank's part of what goes into the first matrices and
  gathers it again in the backward pass. Here it is kept gathered (4sbh), which saves two messages a layer;
  with `normalization` recomputed it is not kept at all and gathered again: less than the paper.
- Full recomputation keeps a layer's input, of which with sequence parallelism each rank has 1/t.
- The means and deviations of the norms (16sb bytes) are counted.
"""


def layout_table(tensor: int, sequence_parallel: bool) -> str:
    name = "One process" if tensor == 1 else f"Tensor parallel {tensor}"
    if tensor > 1:
        name += " with sequence parallelism" if sequence_parallel else ", activations between blocks whole"
    shape = LayerShape(BATCH, SEQUENCE, HIDDEN, HEADS, 4 * HIDDEN, tensor, sequence_parallel)
    layout = LayoutConfig(
        tensor_parallel_size=tensor, data_parallel_size=1, sequence_parallel=sequence_parallel
    )
    text = f"\n## {name}\n\n"
    text += "| computed again | measured, MB | formula, MB | difference | of none "
    text += "| in 16 bits, MB | paper, MB |\n"
    text += "|---|---|---|---|---|---|---|\n"
    args = (config(), layout, [row.switches for row in ROWS], BATCH, SEQUENCE)
    found = launch(measure_on_rank, layout, args)
    ((first,), *_) = found
    for row, (measured,) in zip(ROWS, found):
        formula = layer_bytes(shape, row.level)
        in_16_bits = layer_bytes(shape, row.level, element_size=2, keeps_weights=False)
        paper = f"{korthikanti(shape, row.paper) / 1e6:.2f}" if row.paper else ""
        text += f"| {row.name} | {measured / 1e6:.2f} | {formula / 1e6:.2f} "
        text += f"| {measured / formula - 1:+.1%} | {measured / first:.0%} "
        text += f"| {in_16_bits / 1e6:.2f} | {paper} |\n"
    return text


def budget_table() -> str:
    """What a budget is made of, over eight layers in one process."""
    small = {"num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": None}
    eight = MegatronModelConfig(**{**config().to_dict(), **small})
    mesh = build_mesh(LayoutConfig(data_parallel_size=1))
    text = (
        "\n## Budget\n\nEight layers of hidden size 128, sequence 512, one process: each budget and what "
    )
    text += "was kept within it.\n\n"
    text += "| `activation_memory_budget` | kept, of none | layers by what they keep, MB |\n|---|---|---|\n"
    everything = 0
    for share in (1.0, 0.9, 0.75, 0.5, 0.3, 0.2, 0.1, 0.0):
        switches = TrainingConfig(activation_recomputation="budget", activation_memory_budget=share)
        held = measure_layers(eight, mesh, switches, BATCH, SEQUENCE // 2)
        everything = everything or sum(held)
        kinds = ", ".join(f"{held.count(size)} × {size / 1e6:.1f}" for size in sorted(set(held)))
        text += f"| {share:g} | {sum(held) / everything:.3f} | {kinds} |\n"
    return text


if __name__ == "__main__":
    main()
