"""Text to token files: our whole tool beside the others, as processes, one after the other.

    python benchmarks/encode.py --chinese poems.jsonl prose/
    python benchmarks/encode.py --megatron-lm ~/Megatron-LM --repeat 5

The corpus is mixed from the standard library's sources, Python's documentation topics and the Chinese
files named, as JSON Lines in shuffled order. On it a 32,768-token tokenizer is trained, once with our
split pattern and once with GPT-2's, and every tool encodes the corpus with each:
  mtnlg       `mtnlg encode --workers 1`, from process start to finished files
  classic     what Megatron-LM's preprocess_data.py does: transformers' tokenizer document by document and
              megatron-core's IndexedDatasetBuilder (with --megatron-lm, that script itself)
  gigatoken   the package's encode_files and a plain writer; it knows GPT-2's pattern but not ours
All write .bin and .idx; the files are compared byte by byte. Times are medians over --repeat alternating
rounds. On a shared machine trust the CPU seconds, not the wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mtnlg.tokens import Tokenizer, read_documents
from mtnlg.tokens.split_pattern import GPT2_PATTERN
from mtnlg.tokens.tokenizer import SPECIAL_TOKENS
from mtnlg.tokens.training import learn_definition

HERE = Path(__file__).resolve().parent
NEARBY = HERE.parent.parent / "shared" / "data"
VOCAB_SIZE = 32_768


@dataclass
class Run:
    """One run of one tool."""

    wall: float
    cpu: float
    peak_mb: float


def english() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from topics.values()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def chinese(paths: list[str]) -> Iterator[str]:
    files = [
        file for path in paths for file in ([path] if Path(path).is_file() else Path(path).glob("*.jsonl"))
    ]
    for file in sorted(map(str, files)):
        with open(file, encoding="utf-8") as first:
            key = "paragraphs" if "paragraphs" in json.loads(first.readline()) else "text"
        yield from (document.text for document in read_documents([file], text_key=key))


def build_corpus(path: Path, chinese_paths: list[str], megabytes: float) -> list[str]:
    """Write the corpus; Chinese and English up to half of ``megabytes`` each."""
    texts: list[str] = []
    for side in (english(), chinese(chinese_paths)):
        size = 0.0
        for text in side:
            if text and size < megabytes * 5e5:
                texts.append(text)
                size += len(text.encode())
    random.Random(0).shuffle(texts)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    return texts


def usual_form(definition: str) -> str:
    """GPT-2's cuts as everybody writes them, which is how gigatoken recognises them."""
    content = json.loads(definition)
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content["pre_tokenizer"]["use_regex"] = True
    return json.dumps(content, ensure_ascii=False)


def measure(command: list[str], environment: dict[str, str]) -> Run:
    """Run a command; CPU of the whole tree, and the peak of its summed proportional memory."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
    before = os.times()
    while process.poll() is None:
        peak = max(peak, sum(map(proportional_kb, tree(process.pid))) / 1e3)
        time.sleep(0.05)
    wall, after = time.perf_counter() - began, os.times()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ... failed with {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(wall, cpu, peak)


def tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))
    except OSError:
        return


def proportional_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def tools(folder: Path, corpus: Path, pattern: str, megatron: str | None) -> dict[str, list[str]]:
    """The command of each tool; each writes ``folder/NAME.bin`` and ``.idx``."""
    peer = str(HERE / "peers" / "encode_peers.py")
    tokenizer = str(folder / "tokenizer")
    ours = [sys.executable, "-m", "mtnlg", "encode", str(corpus), "--tokenizer", tokenizer]
    commands = {
        "mtnlg": [*ours, "--out", str(folder / "mtnlg"), "--workers", "1"],
        "classic": [sys.executable, peer, "classic", str(corpus), tokenizer, str(folder / "classic")],
    }
    if megatron:
        script = str(Path(megatron) / "tools" / "preprocess_data.py")
        commands["classic"] = [
            sys.executable,
            script,
            "--input",
            str(corpus),
            "--workers",
            "1",
            "--append-eod",
        ]
        commands["classic"] += ["--output-prefix", str(folder / "classic"), "--tokenizer-model", tokenizer]
        commands["classic"] += ["--tokenizer-type", "HuggingFaceTokenizer"]
    if pattern == "gpt2":
        commands["gigatoken"] = [sys.executable, peer, "gigatoken", str(corpus), tokenizer]
        commands["gigatoken"] += [str(folder / "gigatoken")]
    return commands


def compare(folder: Path, corpus: Path, pattern: str, options: argparse.Namespace) -> list[str]:
    """Run every tool in turn; the rows of the table."""
    commands = tools(folder, corpus, pattern, options.megatron_lm)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(options.repeat):
        for name, command in commands.items():
            for old in folder.glob(f"{name}*.*"):
                old.unlink()
            runs[name].append(
                measure(command, {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
            )
    whole = {name: outputs(folder, name) for name in commands}
    tokens = len(whole["mtnlg"][0]) // 2
    size = corpus.stat().st_size / 1e6
    classic = statistics.median(run.cpu for run in runs["classic"])
    rows = []
    for name, done in runs.items():
        wall = statistics.median(run.wall for run in done)
        cpu = statistics.median(run.cpu for run in done)
        same = "same bytes" if whole[name] == whole["mtnlg"] else "DIFFERENT FILES"
        rows.append(
            f"| {pattern} | {name} | {size / wall:.1f} | {tokens / wall / 1e6:.2f} | {cpu:.1f} | "
            f"{size / cpu:.1f} | {classic / cpu:.1f}× | {max(run.peak_mb for run in done):.0f} | {same} |"
        )
        print(rows[-1], flush=True)
    return rows


def outputs(folder: Path, name: str) -> tuple[bytes, bytes]:
    stem = "classic_text_document" if (folder / f"{name}_text_document.bin").exists() else name
    return (folder / f"{stem}.bin").read_bytes(), (folder / f"{stem}.idx").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    nearby = [str(NEARBY / "poems"), str(NEARBY / "zh")] if NEARBY.is_dir() else []
    parser.add_argument("--chinese", nargs="*", default=nearby, help="JSON Lines files or folders of them")
    parser.add_argument("--megabytes", type=float, default=65.0, help="of the corpus, at most")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--megatron-lm", metavar="CHECKOUT")
    parser.add_argument("--work", default="/tmp/mtnlg-benchmark-encode")
    parser.add_argument("--out", default=str(HERE / "results" / "encode.md"))
    options = parser.parse_args()
    work = Path(options.work)
    work.mkdir(parents=True, exist_ok=True)
    corpus = work / "mix.jsonl"
    texts = build_corpus(corpus, options.chinese, options.megabytes)
    rows = []
    for pattern, expression in (("own", None), ("gpt2", GPT2_PATTERN)):
        folder = work / pattern
        folder.mkdir(exist_ok=True)
        if not (folder / "tokenizer" / "tokenizer.json").exists():
            definition = learn_definition(texts[::4], VOCAB_SIZE, SPECIAL_TOKENS, pattern=expression)
            Tokenizer(usual_form(definition) if expression else definition).save_pretrained(
                folder / "tokenizer"
            )
        rows += compare(folder, corpus, pattern, options)
    head = (
        "# Encoding\n\n"
        f"`benchmarks/encode.py`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.machine()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (ours is 1, the rest others'), Python "
        f"{platform.python_version()}.\nCorpus: {corpus.stat().st_size / 1e6:.1f} MB of JSON Lines, "
        f"{len(texts):,} documents, English and code and Chinese.\nOne encoding process, from start to "
        f"finished files; medians of {options.repeat} alternating rounds.\nThe ratio is of CPU seconds.\n\n"
        "| pattern | tool | MB/s | M tokens/s | CPU s | MB per CPU s | ratio | peak MB | files |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
