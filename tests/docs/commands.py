"""The commands that the documentation shows, and a place where they can be tried."""

import io
import json
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])
RUN = "runs/demo"  # the run that pages take for granted
TINY_MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TINY = [
    *(f"--model.{name}={value}" for name, value in TINY_MODEL.items()),
    "--model.num_key_value_heads=2",
    "--model.max_position_embeddings=256",
    "--data.sequence_length=32",
    "--data.split=80,10,10",
    "--tokenizer.vocab_size=500",
    "--batch.micro_batch_size=2",
    "--batch.global_batch_size=2",
    "--evaluation.interval_steps=0",
    "--evaluation.num_batches=1",
    "--evaluation.sample_tokens=2",
]
TINY_TUNING = [
    "--data.sequence_length=48",
    "--batch.micro_batch_size=1",
    "--batch.global_batch_size=2",
    "--evaluation.interval_steps=0",
    "--training.num_threads=1",
]
QUESTION, ANSWER = "床前明月光", "疑是地上霜。"


def blocks(page, language):
    """The code blocks of a page in one language."""
    fence = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return fence.findall(page.read_text(encoding="utf-8"))


def shell_commands(page):
    """The commands of a page's ``sh`` blocks, line by line, without comments."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def split_command(line):
    """(words, stdin) of a command; ``echo text | command`` gives it that text to read."""
    before, pipe, after = line.partition(" | ")
    if not pipe:
        return shlex.split(line, comments=True), ""
    echo = shlex.split(before)
    assert echo[0] == "echo", f"only echo may feed a command here: {line}"
    return shlex.split(after, comments=True), " ".join(echo[1:]) + "\n"


def _write_chats(place):
    """Data to tune on, in the forms that pages speak of."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    couplet = {"instruction": "續寫下聯", "input": QUESTION, "output": ANSWER}
    dialogue = {"messages": [{"message": QUESTION}, {"message": ANSWER}]}
    for name, record in (("chats", {"messages": turns}), ("couplets", couplet)):
        text = f"{json.dumps(record, ensure_ascii=False)}\n" * 4
        (place / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for name in ("film", "music"):
        text = json.dumps([dialogue] * 4, ensure_ascii=False, indent=1)
        (place / f"{name}_dev.json").write_text(text, encoding="utf-8")


def furnish(place):
    """Make ``place`` look like a checkout with some text and a trained run."""
    import zstandard

    from mtnlg.cli.main import main

    (place / "data").mkdir()
    (place / "data" / "zh").symlink_to(ROOT / "data" / "zh")
    (place / "recipes").symlink_to(ROOT / "recipes")
    lines = [
        line
        for path in sorted((ROOT / "data" / "zh").glob("*.txt"))
        for line in path.read_text("utf-8").splitlines()
        if len(line) > 10
    ][:300]
    (place / "texts").mkdir()
    with (place / "texts" / "some.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    (place / "web").mkdir()
    packed = zstandard.compress((place / "texts" / "some.jsonl").read_bytes())
    (place / "web" / "some.jsonl.zst").write_bytes(packed)
    with (place / "poems.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            record = {"text": line, "paragraphs": line.split("，")}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    _write_chats(place)
    (place / "input.txt").write_text("\n".join(lines), encoding="utf-8")
    (place / "start.yaml").write_text("stop: {steps: 2}\n")
    words = [f"--run_dir={place / RUN}", f"--data.sources={place / 'texts'}", *TINY]
    assert main(["train", str(place / "start.yaml"), *words]) == 0


def feed(text):
    """A stdin that holds ``text``."""
    return io.StringIO(text)
