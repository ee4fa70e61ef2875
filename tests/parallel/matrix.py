"""The whole matrix of layouts beside one process, as a table.

    python -m tests.parallel.matrix [--compiled] [--out benchmarks/results/parity.md]

Takes some minutes: eight ranks on real gloo groups, one thread each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.parallel import workers
from tests.parallel.parity import BOUND, FAMILIES, Case, Difference, compare, layout_fields
from tests.parallel.test_checkpoints import assert_bit_equal, merged
from tests.ranks import RankPool

SEVEN = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
BF16_BOUND = 0.05  # bf16 keeps 8 bits: tensor-parallel sums of sums round twice


def cases() -> Iterator[Case]:
    """Every layout with every family and embedding, then every option on a layout that it touches."""
    for (tensor, pipeline, data), family, tied in itertools.product(SEVEN, FAMILIES, (True, False)):
        yield Case(tensor, pipeline, data, family, tied)
    for tensor, pipeline, data in SEVEN:
        yield Case(tensor, pipeline, data, "llama", documents=True)
        yield Case(tensor, pipeline, data, "gpt", switches={"activation_recomputation": "full"})
        yield Case(tensor, pipeline, data, "gpt", precision={"dtype": "bf16"})
    for data in (1, 2):
        yield Case(2, 1, data, layout={"sequence_parallel": False})
        yield Case(2, 2, data, "llama", False, layout={"sequence_parallel": False}, documents=True)
        yield Case(2, 1, data, model={"parallel_output": False})
        yield Case(2, 2, data, "llama", switches={"activation_recomputation": "selective"})
        yield Case(1, 2, data, layout={"pipeline_schedule": "gpipe"})
    for sharding in ("ddp", "zero2", "zero3"):
        for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
            yield Case(tensor, pipeline, 2, "gpt", layout={"data_parallel_sharding": sharding})
    yield Case(1, 3, 1, "llama")
    yield Case(1, 4, 2, "llama")
    yield Case(2, 3, 1, "gpt", model={"num_hidden_layers": 7})
    yield Case(1, 1, 4)
    yield Case(4, 1, 2, model={"vocab_size": 10})  # 3, 3, 3 and 1 entries
    yield Case(2, 1, 4, "llama", False)
    yield Case(1, 2, 2, model={"pre_process_first": False, "post_process_last": False})


def compiled_cases() -> Iterator[Case]:
    """Layouts with ``torch.compile`` on each layer (minutes: every rank compiles)."""
    for sizes in ((1, 1, 1), *SEVEN):
        yield Case(*sizes, family="llama", switches={"compile": True})


def parity_rows(
    pool: RankPool, chosen: Iterator[Case], timeout: float
) -> Iterator[tuple[Case, Difference]]:
    """Run the cases one after the other."""
    references: dict[str, Any] = {}
    for case in chosen:
        difference = compare(pool, case, references, timeout)
        print(f"{case.name:70} gradient {difference.gradient:.1e}", file=sys.stderr)
        yield case, difference


def is_good(case: Case, difference: Difference) -> bool:
    """Whether a case is within its bound."""
    bound = BF16_BOUND if case.precision.get("dtype") == "bf16" else BOUND
    worst = max(difference.gradient, difference.loss, difference.norm)
    return worst <= bound and difference.weights_equal and difference.tied_copies_equal


def checkpoint_pairs(pool: RankPool) -> Iterator[tuple[str, str, float]]:
    """Save in each layout, go on in each: the largest relative difference of the next loss."""
    model = {**FAMILIES["gpt"], "num_hidden_layers": 3}
    layouts = [(1, 1, 1), *SEVEN]
    with tempfile.TemporaryDirectory() as folder:
        for source in layouts:
            run = f"{folder}/{source}"
            first = _train(pool, model, source, run, 0)
            saved = merged(first)
            for target in layouts:
                results = _train(pool, model, target, run, 1)
                assert_bit_equal(results, saved)
                losses = [result["losses"][0] for result in results]
                if target == (1, 1, 1):
                    expected = losses[0]
                worst = max(abs(loss - expected) / expected for loss in losses)
                yield _name(source), _name(target), worst


def _train(pool: RankPool, model: dict[str, Any], sizes: tuple[int, ...], run: str, step: int) -> Any:
    args = (model, layout_fields(*sizes), {"name": "adamw"}, run, step, 1)
    return pool.run(int(np.prod(sizes)), workers.continue_training, *args, timeout=600.0)


def _name(sizes: tuple[int, ...]) -> str:
    named = zip(("tp", "pp", "dp"), sizes)
    return "x".join(f"{name}{size}" for name, size in named if size > 1) or "one process"


def report(rows: list[tuple[Case, Difference]], pairs: list[tuple[str, str, float]], seconds: float) -> str:
    """The table in Markdown."""
    good = sum(is_good(*row) for row in rows)
    lines = [
        "# Layouts beside one process",
        "",
        f"Measured {datetime.now(UTC):%Y-%m-%d} with torch {torch.__version__}, gloo, one thread a rank, "
        f"{os.cpu_count()} cores ({platform.machine()}), in {seconds / 60:.0f} minutes. "
        "Again: `python -m tests.parallel.matrix`.",
        "",
        "Gradient: largest difference over the largest gradient of the whole model, unclipped, over all "
        f"ranks. Bound {BOUND:g} in float32 and {BF16_BOUND:g} in bf16. Loss and norm: relative. Every row "
        "also has the first weights bit-equal to one process, the copies of a tied embedding bit-equal, "
        "masked labels of unequal counts, an odd vocabulary (37) and layers that do not divide (3, 5).",
        "",
        f"{good} of {len(rows)} within the bound.",
        "",
        "| layout | gradient | loss | norm | |",
        "|---|---|---|---|---|",
    ]
    for case, found in rows:
        verdict = "" if is_good(case, found) else "**out of bound**"
        lines.append(
            f"| {case.name} | {found.gradient:.1e} | {found.loss:.1e} | {found.norm:.1e} | {verdict} |"
        )
    lines += _pair_lines(pairs)
    return "\n".join(lines) + "\n"


def _pair_lines(pairs: list[tuple[str, str, float]]) -> list[str]:
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compiled", action="store_true", help="also compiled layers (minutes)")
    parser.add_argument("--out", default="benchmarks/results/parity.md")
    options = parser.parse_args()
    pool = RankPool()
    begun = time.monotonic()
    try:
        rows = list(parity_rows(pool, cases(), 600.0))
        if options.compiled:
            rows += parity_rows(pool, compiled_cases(), 1800.0)
        pairs = list(checkpoint_pairs(pool))
    finally:
        pool.close()
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(report(rows, pairs, time.monotonic() - begun), encoding="utf-8")
    print(f"written {out}")
    return 0 if all(is_good(*row) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
