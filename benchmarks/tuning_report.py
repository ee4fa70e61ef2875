"""``benchmarks/results/tuning.md`` from everything that ``benchmarks/tuning.py`` measured."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path

TITLES = {
    "full": "full tuning",
    "lora": "LoRA",
    "dora": "DoRA",
    "qlora": "QLoRA, int4",
    "prompt": "20 virtual tokens",
    "prefix": "prefix of 20",
}


def write_report(out: Path, path: Path) -> None:
    """The tables and texts of ``OUT/results.json``."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    judged = [found for found in results.values() if "after" in found]
    lines = ["# Tuning on real text", ""]
    if judged:
        note = f" {judged[0]['note']}." if judged[0]["note"] else ""
        where = f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores"
        lines += [
            f"{where}, {judged[0]['threads']} threads.{note} Made by `benchmarks/tuning.py`; loss is nats "
            "a scored token on held-out text, answers are greedy.",
            "",
        ]
    lines += [*_bases(results), *_couplets(results), *_dialogues(results), *_students(results)]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


def _bases(results: dict) -> list[str]:
    found = {name: one for name, one in results.items() if name.endswith(" base")}
    if not found:
        return []
    lines = [
        "## What is tuned",
        "",
        "| | parameters | tokens of vocabulary | steps | tokens | minutes | validation loss "
        "| nats a token, a character, bits a byte of held-out text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        text = [one.get(key) for key in ("nats_per_token", "nats_per_character", "bits_per_byte")]
        shown = ", ".join(f"{value:.3f}" for value in text if value is not None)
        loss = "" if one["validation_loss"] is None else f"{one['validation_loss']:.3f}"
        lines.append(
            f"| {name} | {one['parameters']:,} | {one['vocabulary']:,} | {one['step']:,} "
            f"| {one['tokens']:,} | {one['seconds'] / 60:.0f} | {loss} | {shown} |"
        )
    return [*lines, ""]


def _couplets(results: dict) -> list[str]:
    found = {name: results[f"couplets {name}"] for name in TITLES if f"couplets {name}" in results}
    if not found:
        return []
    full = found.get("full")
    lines = [
        "## The next line of a couplet",
        "",
        "| | learning rate | seconds (wall, processor) | saved | loss | nats a character "
        "| of full tuning's gain | in form | well formed | level end | distinct-2 "
        "| overlap with the poet |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(found.values()))
    lines.append(f"| the base | | | | {_couplet_cells(first['before'], '')} |")
    for name, one in found.items():
        share = "" if full is None else f"{_gain(one) / _gain(full):.1%}"
        took = f"{one['wall_seconds']}, {one['processor_seconds']}"
        lines.append(
            f"| {TITLES[name]} | {one['learning_rate']:g} | {took} | {one['saved_bytes'] / 1e6:.2f} MB "
            f"| {_couplet_cells(one['after'], share)} |"
        )
        if name == "full":
            lines.append(f"| the same, `--verse` | | | | {_couplet_cells(one['after']['verse'], '')} |")
    lines.append(f"| the poets | | | | {_couplet_cells(first['after']['poet'], '')} |")
    lines += [
        "",
        f"{first['steps']} steps of {first['tokens'] // first['steps']:,} tokens each. In form: as many "
        "Han characters as the line above, a full stop, and ended by the model. Well formed: also none of "
        "the line above and none twice. Level end: the last character has a level tone in the Pingshui "
        "book.",
        "",
        *_texts(found),
    ]
    return [*lines, *_rates(results)]


def _couplet_cells(one: dict, share: str) -> str:
    losses = [f"{one['loss']:.4f}", f"{one['nats_per_character']:.4f}"] if "loss" in one else ["", ""]
    shares = [f"{one[key]:.0%}" for key in ("in_form", "well_formed", "level_end")]
    return " | ".join([*losses, share, *shares, f"{one['distinct']:.2f}", f"{one['overlap']:.3f}"])


def _texts(found: dict) -> list[str]:
    first = next(iter(found.values()))
    lines = [
        f"| first held-out lines | the base | {' | '.join(TITLES[name] for name in found)} "
        "| --verse | the poet |"
    ]
    lines.append("|" + "---|" * (len(found) + 4))
    for number, (upper, _, poet, verse) in enumerate(first["after"]["shown"]):
        before = first["before"]["shown"][number][1]
        texts = [before, *(one["after"]["shown"][number][1] for one in found.values()), verse, poet]
        lines.append(f"| {upper} | {' | '.join(map(_one_line, texts))} |")
    return [*lines, ""]


def _rates(results: dict) -> list[str]:
    found = {name: results[f"rates {name}"] for name in TITLES if f"rates {name}" in results}
    if not found:
        return []
    lines = ["Learning rates, by the loss on couplets kept for that after a third of the steps:", ""]
    for name, losses in found.items():
        lines.append(
            f"- {TITLES[name]}: " + ", ".join(f"{rate} {loss:.3f}" for rate, loss in losses.items())
        )
    return [*lines, ""]


def _dialogues(results: dict) -> list[str]:
    one = results.get("dialogues full")
    if one is None:
        return []
    lines = [
        "## Dialogues of KdConv",
        "",
        f"Full tuning, {one['steps']} steps, {one['tokens']:,} tokens, {one['wall_seconds']} seconds "
        f"({one['processor_seconds']} of a processor).",
        "",
        "| | loss | nats a character | turns ended | overlap with the speaker | distinct-2 "
        "| characters a turn |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("before", "after"):
        part = one[name]
        lines.append(
            f"| {name} | {part['loss']:.4f} | {part['nats_per_character']:.4f} | {part['ended']:.0%} "
            f"| {part['overlap']:.3f} | {part['distinct']:.2f} | {part['characters']:.1f} |"
        )
    lines += ["", "| held-out turn | before | after | the speaker |", "|---|---|---|---|"]
    for (asked, before, speaker), (_, after, _) in zip(one["before"]["shown"], one["after"]["shown"]):
        lines.append("| " + " | ".join(map(_one_line, (asked, before, after, speaker))) + " |")
    return [*lines, ""]


def _students(results: dict) -> list[str]:
    found = {name: one for name, one in results.items() if name.startswith("student")}
    if not found:
        return []
    lines = [
        "## A student of the fully tuned model",
        "",
        "| | loss | in form | well formed | seconds (wall, processor) |",
        "|---|---|---|---|---|",
    ]
    for name, one in found.items():
        after = one["after"]
        lines.append(
            f"| {name} | {after['loss']:.4f} | {after['in_form']:.0%} | {after['well_formed']:.0%} "
            f"| {one['wall_seconds']}, {one['processor_seconds']} |"
        )
    return [*lines, ""]


def _gain(found: dict) -> float:
    return found["before"]["loss"] - found["after"]["loss"]


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ⏎ ").replace("|", "\\|") or "(nothing)"
