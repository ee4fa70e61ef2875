"""The whole matrix of layouts beside one process, as a table.

    python -m tests.parallel.matrix [--topic context] [--compiled] [--device cuda] [--resume]

Takes some minutes: up to eight ranks on real gloo groups, one thread each; with ``--device cuda`` on NCCL,
as many ranks as there are GPUs. Interrupted (Ctrl-C), it tables what it has and says how much is missing;
what is done is kept beside the table until it is whole, so that ``--resume`` goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tests.parallel.cases import cases_of, topics
from tests.parallel.checkpoint_pairs import checkpoint_pairs
from tests.parallel.parity import BOUNDS, Case, Difference, compare
from tests.ranks import RankError, RankPool, device_type

NUMBERS = ("gradient", "loss", "norm", "after")
EXPLANATION = """\
Each row is one model in one layout, beside one process that trains in float32 on the same batches: masked
labels of unequal counts, an odd vocabulary, layers that do not divide. *Gradient*: largest difference of an
unclipped gradient over the largest gradient of the model, over all ranks. *Loss* (in training and in
evaluation) and gradient *norm*: relative. *Weights*: after three clipped steps of AdamW, largest difference
over the largest change (epsilon is as large as the gradients there: AdamW divides a gradient by its own
size, and where the true gradient is zero that size is rounding error). Bounds: {bounds}; for the weights
three times that, one for each step, since each step multiplies the rounding of the last. The first weights
are the same bits everywhere, and so are all copies of a weight and its gradient."""
Row = dict[str, Any]  # topic, case, the numbers of a Difference, problems


def rows_of(
    pool: RankPool, chosen: list[tuple[str, Case]], done: dict[str, Row], timeout: float
) -> Iterator[Row]:
    """One row for each case, in the order given; those already ``done`` are not run again."""
    references: dict[str, Any] = {}
    size = 0
    for number, (topic, case) in enumerate(chosen, 1):
        if case.size != size:
            pool.end_world(size)
            size = case.size
        found = again(done.get(case.name), case) or run(pool, case, references, timeout)
        row = {"topic": topic, "case": case.name, **found}
        verdict = "; ".join(row["problems"]) or f"gradient {row['gradient']:.1e}  after {row['after']:.1e}"
        print(f"{number}/{len(chosen)} {case.name:70} {verdict}", file=sys.stderr)
        yield row


def run(pool: RankPool, case: Case, references: dict[str, Any], timeout: float) -> Row:
    """The numbers of one case; a failure is a row too."""
    try:
        difference: Difference = compare(pool, case, references, timeout)
    except (RankError, AssertionError) as error:
        print(error, file=sys.stderr)
        last = str(error).strip().splitlines()[-1]
        return {**dict.fromkeys(NUMBERS, float("nan")), "problems": [last]}
    return {**dataclasses.asdict(difference), "problems": difference.problems(case)}


def again(row: Row | None, case: Case) -> Row | None:
    """A row of an earlier run, judged by today's bounds; ``None`` where there is no result."""
    if row is None or any(math.isnan(row[name]) for name in NUMBERS):
        return None
    difference = Difference(**{item.name: row[item.name] for item in dataclasses.fields(Difference)})
    return {**dataclasses.asdict(difference), "problems": difference.problems(case)}


def chosen_cases(topic: str | None, compiled: bool, most_ranks: int) -> list[tuple[str, Case]]:
    """Cases with their topics, few ranks first; each once."""
    found: dict[str, tuple[str, Case]] = {}
    for name in [topic] if topic else topics():
        for case in cases_of(name, whole=True, compiled=compiled):
            if case.size <= most_ranks:
                found.setdefault(case.name, (name, case))
    return sorted(found.values(), key=lambda pair: pair[1].size)


def report(rows: list[Row], pairs: list[tuple[str, str, float]], minutes: float, missing: int) -> str:
    """The tables in Markdown."""
    good = sum(not row["problems"] for row in rows)
    where = f"{os.cpu_count()} cores ({platform.machine()}), gloo, one thread a rank"
    if device_type() == "cuda":
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL"
    bounds = ", ".join(f"{bound:g} in {name}" for name, bound in BOUNDS.items())
    lines = [
        "# Layouts beside one process",
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__}, {where}, in {minutes:.0f} "
        "minutes. Again: `python -m tests.parallel.matrix`.",
        "",
        EXPLANATION.format(bounds=bounds),
        "",
        f"{good} of {len(rows)} within their bounds.",
    ]
    if missing:
        lines += ["", f"Interrupted: {missing} more cases, of the most ranks, were not run."]
    for topic in dict.fromkeys(row["topic"] for row in rows):
        lines += table(topic, [row for row in rows if row["topic"] == topic])
    return "\n".join(lines + pair_lines(pairs)) + "\n"


def table(topic: str, rows: list[Row]) -> list[str]:
    """One topic's rows."""
    lines = ["", f"## {topic.capitalize()}", "", "| layout | gradient | loss | norm | weights | |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        numbers = " | ".join(f"{row[name]:.1e}" for name in NUMBERS)
        verdict = f"**{'; '.join(row['problems'])}**" if row["problems"] else ""
        lines.append(f"| {row['case']} | {numbers} | {verdict.replace('|', '/')} |")
    return lines


def pair_lines(pairs: list[tuple[str, str, float]]) -> list[str]:
    """What became of checkpoints."""
    if not pairs:
        return []
    worst = max(difference for _, _, difference in pairs)
    return [
        "",
        "## Checkpoints",
        "",
        f"Saved in each of {len({source for source, _, _ in pairs})} layouts and continued in each: "
        f"{len(pairs)} pairs, weights and optimizer state bit-equal after loading in all of them; the next "
        f"loss differs by at most {worst:.1e} (relative).",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topic", choices=topics(), help="only the cases of one topic")
    parser.add_argument("--compiled", action="store_true", help="also compiled layers (minutes)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on where the last run was interrupted")
    parser.add_argument("--out", help="the table; benchmarks/results/parity.md for the whole on the CPU")
    options = parser.parse_args()
    os.environ["MTNLG_TEST_DEVICE"] = options.device
    words = ["parity", *filter(None, [options.topic, options.device.removeprefix("cpu")])]
    out = Path(options.out or f"benchmarks/results/{'-'.join(words)}.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    most_ranks = torch.cuda.device_count() if options.device == "cuda" else 8
    part = out.with_suffix(".part")
    done: dict[str, Row] = {}
    if options.resume and part.exists():
        done = {row["case"]: row for row in map(json.loads, part.read_text().splitlines())}
    pool, begun = RankPool(), time.monotonic()
    rows, pairs = [], []
    chosen = chosen_cases(options.topic, options.compiled, most_ranks)
    try:
        with part.open("w") as file:
            for row in rows_of(pool, chosen, done, 1800.0 if options.compiled else 300.0):
                file.write(json.dumps(row, default=float) + "\n")
                file.flush()
                rows.append(row)
        if not options.topic and most_ranks >= 8:
            pairs = list(checkpoint_pairs(pool))
    except KeyboardInterrupt:
        print(f"interrupted after {len(rows)} of {len(chosen)} cases; --resume goes on", file=sys.stderr)
    finally:
        pool.close()
    missing, minutes = len(chosen) - len(rows), (time.monotonic() - begun) / 60.0
    out.write_text(report(rows, pairs, minutes, missing), encoding="utf-8")
    if not missing:
        part.unlink()
    print(f"written {out}")
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
