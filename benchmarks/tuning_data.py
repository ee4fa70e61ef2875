"""Real text for ``benchmarks/tuning.py``: poems, couplets, dialogues, each with a part held out.

Of the poems every 40th is held out, from the base as from tuning (as in ``benchmarks/real_text.py``); the
20th after it is kept from tuning, to choose learning rates on. Of KdConv the dev files are learnt and the
test files held out; the facts that speakers of the dev files had before them are text for the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

HAN = r"[㐀-鿿𠀀-𯿿]"
COUPLET = re.compile(rf"({HAN}{{5}}|{HAN}{{7}})，({HAN}+)。")
INSTRUCTION = "續寫下聯"
HELD_OUT_EVERY = 40
POEMS, PROSE = "poems/tang_shi.jsonl", "zh/vernacular_novels.jsonl"
TOPICS = ("film", "music")
WHERE_FROM = {
    POEMS: "poems as {paragraphs: [line, ...]}, one a line, made of 全唐诗/poet.tang.*.json of "
    "https://github.com/chinese-poetry/chinese-poetry",
    PROSE: "any Chinese prose as {text: ...}, one a line",
    "zh/kdconv_": "data/{film,music}/{dev,test}.json of https://github.com/thu-coai/KdConv, named "
    "kdconv_film_dev.json and so on",
}


def check(folder: Path, needed: Iterable[str]) -> None:
    """Stop where a file of the data is missing, and say where it comes from."""
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        hints = {WHERE_FROM[key] for name in missing for key in WHERE_FROM if name.startswith(key)}
        raise SystemExit(
            f"not in {folder}: {', '.join(missing)}. Put there, or name another folder with --data:\n  "
            + "\n  ".join(sorted(hints))
        )


def kdconv(folder: Path, part: str) -> list[str]:
    """KdConv's files of one part, as they are."""
    names = [f"zh/kdconv_{topic}_{part}.json" for topic in TOPICS]
    check(folder, names)
    return [str(folder / name) for name in names]


def write_poems(folder: Path, out: Path) -> tuple[Path, Path]:
    """Poems to learn and poems held out, as sources of ``mtnlg train``."""
    check(folder, [POEMS])
    lines = (folder / POEMS).read_text(encoding="utf-8").splitlines()
    out.mkdir(parents=True, exist_ok=True)
    parts = {"poems": [], "poems-held-out": []}
    for number, line in enumerate(lines):
        parts["poems" if number % HELD_OUT_EVERY else "poems-held-out"].append(line)
    return tuple(_write(out / f"{name}.jsonl", found) for name, found in parts.items())


def write_couplets(folder: Path, out: Path, counts: dict[str, int]) -> dict[str, Path]:
    """Couplets as instructions: ``train``, ``validation`` and ``held-out``, so many of each."""
    check(folder, [POEMS])
    parts: dict[str, list[str]] = {name: [] for name in counts}
    for number, line in enumerate((folder / POEMS).read_text(encoding="utf-8").splitlines()):
        name = {0: "held-out", HELD_OUT_EVERY // 2: "validation"}.get(number % HELD_OUT_EVERY, "train")
        parts[name] += [_record(*pair) for pair in _couplets(json.loads(line)["paragraphs"])]
    out.mkdir(parents=True, exist_ok=True)
    return {
        name: _write(
            out / f"couplets-{name}.jsonl", found[:: max(1, len(found) // counts[name])][: counts[name]]
        )
        for name, found in parts.items()
    }


def write_dialogue_text(folder: Path, out: Path) -> list[dict[str, object]]:
    """Text for the base of the dialogues, as weighted sources: turns, facts, prose."""
    check(folder, [PROSE])
    turns, facts = [], {}
    for path in kdconv(folder, "dev"):
        for dialogue in json.loads(Path(path).read_text(encoding="utf-8")):
            turns.append(_text("\n".join(turn["message"] for turn in dialogue["messages"])))
            for turn in dialogue["messages"]:
                for fact in turn.get("attrs", []):
                    facts[_text(f"{fact['name']}，{fact['attrname']}：{fact['attrvalue']}")] = True
    out.mkdir(parents=True, exist_ok=True)
    return [
        {"path": str(_write(out / "turns.jsonl", turns)), "weight": 0.5},
        {"path": str(_write(out / "facts.jsonl", list(facts))), "weight": 0.25},
        {"path": str(folder / PROSE), "weight": 0.25},
    ]


def _couplets(paragraphs: list[str]) -> list[tuple[str, str]]:
    found = [COUPLET.fullmatch(line) for line in paragraphs]
    return [match.groups() for match in found if match and len(match[1]) == len(match[2])]


def _record(upper: str, lower: str) -> str:
    values = {"instruction": INSTRUCTION, "input": upper, "output": f"{lower}。"}
    return json.dumps(values, ensure_ascii=False)


def _text(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False)


def _write(path: Path, lines: list[str]) -> Path:
    text = "\n".join(lines) + "\n"
    if (
        not path.exists() or path.read_text(encoding="utf-8") != text
    ):  # a run that goes on wants it untouched
        path.write_text(text, encoding="utf-8")
    return path
