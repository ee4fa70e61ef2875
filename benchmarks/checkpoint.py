"""How long training stands still for a checkpoint, written in the background or waited for.

    python benchmarks/checkpoint.py --output benchmarks/results/checkpoint.md

Both kinds take turns in one run. Standing still is the time that the training thread spends in ``save``
and, before the next update of the weights, waiting for their copy; the save's time is from its begin
until ``latest`` points to the checkpoint. All ranks and their disk are this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from train_step import cpu_name

from mtnlg.config import (
    CheckpointConfig,
    LayoutConfig,
    MegatronModelConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from mtnlg.parallel import build_mesh, launch, lay_out
from mtnlg.tokens.batch import Batch
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.saving import CheckpointSaver, Parts
from mtnlg.training.step import TrainingStep

LAYERS, HIDDEN, HEADS, VOCAB, SEQUENCE, BATCH = 6, 384, 6, 8192, 256, 2
LAYOUTS = {
    "one process": LayoutConfig(data_parallel_size=1),
    "tp2": LayoutConfig(tensor_parallel_size=2, data_parallel_size=1),
    "dp2 (zero1)": LayoutConfig(data_parallel_size=2),
}
Times = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to be measured")
    parser.add_argument("--output", help="also write the table to this file")
    arguments = parser.parse_args()
    rows = []
    for name, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            threads = 2 // layout.num_ranks
            times = launch(measure, layout, (layout, folder, arguments.rounds, threads))
        rows.append((name, times))
        print(name, times, file=sys.stderr, flush=True)
        if arguments.output:
            Path(arguments.output).write_text(report(rows, arguments.rounds))
    print(report(rows, arguments.rounds))


def measure(layout: LayoutConfig, folder: str, rounds: int, threads: int) -> dict[str, Times]:
    """Seconds of each kind on this rank."""
    torch.set_num_threads(threads)
    mesh = build_mesh(layout)
    config = MegatronModelConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
    )
    model = lay_out(config, mesh)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
    training = TrainingStep(
        model, optimizer, OptimizerConfig(), LossScale(PrecisionConfig()), 0, before_update=lambda: copied()
    )
    rows = max(1, BATCH // mesh.num_replicas)
    ids = torch.randint(0, VOCAB, (rows, SEQUENCE))

    def copied() -> None:
        for saver in savers.values():
            saver.wait_for_copy()

    def step() -> float:
        begun = time.perf_counter()
        training.run([Batch(ids, ids)], rows * SEQUENCE * mesh.num_replicas, 1.0)
        return time.perf_counter() - begun

    def parts() -> Parts:
        return {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}

    savers = {
        kind: CheckpointSaver(folder, CheckpointConfig(asynchronous=kind == "asynchronous"), mesh)
        for kind in ("waited for", "asynchronous")
    }
    savers["asynchronous"].prepare(parts())
    step()
    savers["asynchronous"].wait()
    times: dict[str, Times] = {kind: {"still": [], "save": [], "step": []} for kind in savers}
    times["none"] = {"step": []}
    for number in range(rounds):
        for kind, saver in savers.items():
            mesh.barrier()
            begun = time.perf_counter()
            saver.save(2 * number + 1 + (kind == "asynchronous"), parts(), {"format": 1})
            still = time.perf_counter() - begun - saver.waited_seconds
            steps = [step() for _ in range(2)] if kind == "asynchronous" else []
            saver.wait()
            times[kind]["still"].append(still + saver.waited_seconds)  # in ``save``, and before the update
            times[kind]["save"].append(saver.written_seconds)
            # Steps that were over before the save was: those that it slowed down.
            during = [s for s, end in zip(steps, _ends(saver, steps)) if end <= saver.written_seconds]
            times[kind]["step"] += during
        times["none"]["step"].append(step())
    bytes_here = sum(t.nbytes for tensors in parts().values() for t in map(_local, tensors.values()))
    times["none"]["bytes"] = [mesh.sum_over_ranks(torch.tensor(float(bytes_here))).item()]
    return times


def _ends(saver: CheckpointSaver, steps: list[float]) -> list[float]:
    """When each step was over, from the beginning of the save."""
    ends, now = [], saver.waited_seconds
    for seconds in steps:
        now += seconds
        ends.append(now)
    return ends


def _local(tensor: Any) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def report(rows: list[tuple[str, dict[str, Times]]], rounds: int) -> str:
    text = f"""# Saving checkpoints

{date.today()}, {cpu_name()}, torch {torch.__version__}, medians of {rounds} alternating saves.
`python benchmarks/checkpoint.py`

{LAYERS} layers × {HIDDEN}, vocabulary {VOCAB:,}: weights and AdamW's state in float32. Every tensor is
checksummed (SHA-256) and flushed to the disk. Standing still: the training thread is in `save` or, before
the next update of the weights, waits for their copy, which is made during that step's forward and
backward pass. Share: of the asynchronous save's own time. Rank 0's times.

| | state, MB | waited for, ms | asynchronous: standing still, ms | until complete, ms | share (largest) \
| step alone, ms | step during a save, ms |
|---|---|---|---|---|---|---|---|
"""
    for name, times in rows:
        waited, background, none = times["waited for"], times["asynchronous"], times["none"]
        shares = [still / save for still, save in zip(background["still"], background["save"])]
        during = background["step"]
        text += f"| {name} | {none['bytes'][0] / 1e6:.0f} | {median(waited['still'])} "
        text += f"| {median(background['still'])} | {median(background['save'])} "
        text += f"| {statistics.median(shares):.1%} ({max(shares):.1%}) "
        text += f"| {median(none['step'])} | {median(during) if during else 'longer than the save'} |\n"
    return text


def median(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


if __name__ == "__main__":
    main()
