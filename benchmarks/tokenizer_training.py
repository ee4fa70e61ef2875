"""Training a 32,768-token vocabulary: memory, time and characters per token of our cuts and of GPT-2's.

    python benchmarks/tokenizer_training.py --chinese poems.jsonl prose/

Each pattern trains in a process of its own, on 35 MB of Chinese (repeated if there is less) and on the
same with 30 MB of English and code; every 20th document is kept out to measure characters per token on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from mtnlg.tokens import Tokenizer
from mtnlg.tokens.split_pattern import GPT2_PATTERN
from mtnlg.tokens.tokenizer import SPECIAL_TOKENS
from mtnlg.tokens.training import learn_definition

sys.path.insert(0, str(Path(__file__).resolve().parent))
from encode import NEARBY, VOCAB_SIZE, chinese, english

CHINESE_BYTES = 35_000_000
PATTERNS = {"own": None, "gpt2": GPT2_PATTERN}


def train(pattern: str, corpus: str, paths: list[str]) -> dict[str, object]:
    """Train in this process and say what it took; the texts stream, they are not held."""
    held_out: dict[str, list[str]] = {"chinese": [], "english": []}

    def stream(name: str, limit: float):
        size = 0
        while size < limit:
            for number, text in enumerate(chinese(paths) if name == "chinese" else english()):
                if number % 20 == 0:
                    if sum(map(len, held_out[name])) < 1_000_000:
                        held_out[name].append(text)
                    continue
                size += len(text.encode())
                yield text
                if size >= limit:
                    return

    def texts():
        yield from stream("chinese", CHINESE_BYTES)
        if corpus == "mixed":
            yield from stream("english", 30e6)

    began = time.process_time()
    tokenizer = Tokenizer(learn_definition(texts(), VOCAB_SIZE, SPECIAL_TOKENS, pattern=PATTERNS[pattern]))
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    rates = {name: tokenizer.characters_per_token(kept) for name, kept in held_out.items() if kept}
    return {"seconds": seconds, "peak": peak, **rates}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    nearby = [str(NEARBY / "poems"), str(NEARBY / "zh")] if NEARBY.is_dir() else []
    parser.add_argument("--chinese", nargs="*", default=nearby, help="JSON Lines files or folders of them")
    parser.add_argument("--one", nargs=2, metavar=("PATTERN", "CORPUS"), help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "tokenizer_training.md"))
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(*options.one, options.chinese)))
        return
    rows = []
    for corpus in ("chinese", "mixed"):
        for pattern in PATTERNS:
            command = [sys.executable, __file__, "--one", pattern, corpus, "--chinese", *options.chinese]
            environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            got = json.loads(done.stdout.splitlines()[-1])
            english_rate = f"{got['english']:.3f}" if "english" in got else "–"
            rows.append(
                f"| {corpus} | {pattern} | {got['peak']:.0f} | {got['seconds']:.0f} | "
                f"{got['chinese']:.3f} | {english_rate} |"
            )
            print(rows[-1], flush=True)
    head = (
        "# Training a tokenizer\n\n"
        f"`benchmarks/tokenizer_training.py`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}. "
        f"Vocabulary {VOCAB_SIZE:,};\n"
        "35 MB of Chinese, mixed with 30 MB of English and code. Peak resident memory of the whole\n"
        "process; characters a token on documents kept out of the training.\n\n"
        "| corpus | pattern | peak MB | CPU s | Chinese, characters a token | English and code |\n"
        "|---|---|---|---|---|---|\n"
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
