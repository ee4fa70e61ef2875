"""What tuning does to small models on real text, before and after, with held-out text judging.

    python benchmarks/tuning.py couplets --base runs/poems --source tang_shi.jsonl
    python benchmarks/tuning.py dialogues --base runs/demo --source kdconv/
    python benchmarks/tuning.py report

couplets   recipes/tune-couplets.yaml: finish a couplet on instruction; full tuning, LoRA, and prompt
           tuning of 20 virtual tokens, each with the same examples. Every 20th poem is held out.
dialogues  recipes/tune-dialogues.yaml: KdConv's dev files of film and music are learnt, its test files
           are held out.
distill    couplets again, a narrow student from the tuned model's logits beside the student alone.

Loss is the mean over the scored tokens of up to 16,384 held-out tokens, in samples as training reads
them. Answers are greedy. Everything that is
measured goes into OUT/results.json; ``report`` writes the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
HAN = r"[㐀-鿿𠀀-𯿿]"
COUPLET = re.compile(rf"({HAN}{{5}}|{HAN}{{7}})，({HAN}+)。")
INSTRUCTION = "續寫下聯"
METHODS = {
    "full": [],
    "lora": ["--tuning.method=lora", "--tuning.adapter.target_modules=[all-linear]"],
    "prompt": ["--tuning.method=prompt", "--tuning.adapter.num_virtual_tokens=20"],
}
RATES = {"full": 1e-3, "lora": 4e-3, "prompt": 2e-2}
NUM_ANSWERS = 50
MOST_TOKENS = 16_384  # of held-out samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=("couplets", "dialogues", "distill", "report"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--examples", type=int, default=3000, help="couplets to learn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--note", default="", help="about the machine, for the report")
    parser.add_argument("--override", action="append", default=[], help="of the recipe: --a.b=value")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    {"couplets": couplets, "dialogues": dialogues, "distill": distill, "report": report}[arguments.part](
        arguments
    )


def couplets(arguments: argparse.Namespace) -> None:
    """Full tuning, LoRA and prompt tuning on the same couplets."""
    files = write_couplets(arguments.source, arguments.out, arguments.examples)
    for method in arguments.methods:
        overrides = [*METHODS[method], f"--optimizer.learning_rate={RATES[method]}", *arguments.override]
        config = configure(arguments, "tune-couplets", f"couplets-{method}", files, overrides)
        keep(arguments, f"couplets {method}", tune_and_judge(arguments, config, is_couplet=True))


def dialogues(arguments: argparse.Namespace) -> None:
    """KdConv before and after."""
    files = [
        [str(arguments.source / f"kdconv_{topic}_{part}.json") for topic in ("film", "music")]
        for part in ("dev", "test")
    ]
    config = configure(arguments, "tune-dialogues", "dialogues", files, arguments.override)
    keep(arguments, "dialogues full", tune_and_judge(arguments, config, is_couplet=False))


def distill(arguments: argparse.Namespace) -> None:
    """A student with and without the logits of the model that ``couplets`` made by full tuning."""
    files = write_couplets(arguments.source, arguments.out, arguments.examples)
    for name, teacher in (("alone", None), ("distilled", arguments.out / "couplets-full")):
        overrides = [f"--tuning.distillation.teacher={teacher}"] if teacher else []
        overrides += ["--optimizer.learning_rate=2e-3", *arguments.override]
        config = configure(arguments, "tune-couplets", f"student-{name}", files, overrides)
        keep(arguments, f"student {name}", tune_and_judge(arguments, config, is_couplet=True))


def write_couplets(source: Path, out: Path, count: int) -> list[list[str]]:
    """Couplets of poems as instructions; files to learn from and held out."""
    poems = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    parts: dict[str, list[str]] = {"train": [], "held-out": []}
    for number, poem in enumerate(poems):
        found = [COUPLET.fullmatch(line) for line in poem["paragraphs"]]
        pairs = [match.groups() for match in found if match and len(match[1]) == len(match[2])]
        parts["train" if number % 20 else "held-out"] += [record(*pair) for pair in pairs]
    files = []
    for name, most in (("train", count), ("held-out", 400)):
        step = max(1, len(parts[name]) // most)  # from all over the source
        path = out / f"couplets-{name}.jsonl"
        path.write_text("\n".join(parts[name][::step][:most]) + "\n", encoding="utf-8")
        files.append([str(path)])
    return files


def record(upper: str, lower: str) -> str:
    values = {"instruction": INSTRUCTION, "input": upper, "output": f"{lower}。"}
    return json.dumps(values, ensure_ascii=False)


def configure(arguments, recipe: str, name: str, files: list[list[str]], overrides: list[str]):
    from mtnlg.config.load import load_run_config
    from mtnlg.tuning import tuning_defaults

    given = [
        f"--run_dir={arguments.out / name}",
        f"--tuning.base={arguments.base}",
        f"--tuning.data={json.dumps(files[0])}",
        f"--tuning.validation_data={json.dumps(files[1])}",
        f"--training.num_threads={arguments.threads}",
        "--training.device=cpu",
    ]
    path = REPOSITORY / "recipes" / f"{recipe}.yaml"
    return load_run_config(path, [*given, *overrides], tuning_defaults)


def tune_and_judge(arguments, config, is_couplet: bool) -> dict:
    from mtnlg.training import train
    from mtnlg.tuning import Tuning

    work = Tuning(print)
    config = work.prepare(config, lambda *_: None)
    before = judge(config, str(config.tuning.base), is_couplet)
    began = (time.perf_counter(), time.process_time())
    result = train(config, work=work, fresh=True)
    wall, used = time.perf_counter() - began[0], time.process_time() - began[1]
    after = judge(config, config.run_dir, is_couplet)
    weights = Path(result.checkpoint) / "weights"
    return {
        "steps": result.step,
        "tokens": result.tokens,
        "wall_seconds": round(wall),
        "processor_seconds": round(used),
        "saved_bytes": sum(file.stat().st_size for file in weights.iterdir()),
        "before": before,
        "after": after,
        "threads": arguments.threads,
        "note": arguments.note,
    }


def judge(config, path: str, is_couplet: bool) -> dict:
    """Loss on held-out samples, and greedy answers to some."""
    from mtnlg import MegatronLmModel, Tokenizer
    from mtnlg.tuning import Tuning

    model = MegatronLmModel.from_pretrained(path)
    model.tokenizer = Tokenizer.from_pretrained(Path(config.run_dir) / "tokenizer")
    stream = Tuning().validation_stream(config, None)
    summed = valid = 0.0
    most = max(1, MOST_TOKENS // config.data.sequence_length)
    for start in range(0, min(stream.num_samples, most), 8):
        batch = stream.batch(start, 8)
        with torch.no_grad():
            output = model(batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
        summed, valid = summed + float(output.loss), valid + batch.num_valid_tokens
    asked = held_out(config)
    answers = answer_all(model, [messages for messages, _ in asked])
    found = {"loss": summed / valid, "scored_tokens": int(valid)}
    found["ended"] = sum(is_ended for _, is_ended in answers) / len(answers)
    wanted = [answer for _, answer in asked]
    scores = [overlap(text, answer) for (text, _), answer in zip(answers, wanted)]
    found["overlap"] = sum(scores) / len(scores)
    if is_couplet:
        right = [
            is_ended and re.fullmatch(rf"{HAN}{{{len(answer) - 1}}}。", text.strip()) is not None
            for (text, is_ended), answer in zip(answers, wanted)
        ]
        found["in_form"] = sum(right) / len(right)
    found["shown"] = [
        [messages[-1]["content"].split("\n")[-1], text] for (messages, _), (text, _) in zip(asked, answers)
    ][:6]
    return found


def held_out(config) -> list[tuple[list[dict], str]]:
    """Conversations up to their last answer, with that answer."""
    from mtnlg.tuning import read_conversations

    tuning = config.tuning
    found = read_conversations(tuning.validation_data, tuning.format, tuning.system, tuning.max_turns)
    chosen = found[:: max(1, len(found) // NUM_ANSWERS)][:NUM_ANSWERS]
    return [(one.messages[:-1], one.messages[-1]["content"]) for one in chosen]


def answer_all(model, questions: list[list[dict]]) -> list[tuple[str, bool]]:
    """Greedy answers, and whether the model ended each itself."""
    from mtnlg.generation.dialogue_format import dialogue_prompt

    prompts = [dialogue_prompt(model.tokenizer, messages) for messages in questions]
    done = model.generate([p.ids for p in prompts], max_new_tokens=48, temperature=0.0, details=True)
    answers = []
    for prompt, generation in zip(prompts, done):
        ids = list(generation.new_ids)
        end = next((place for place, token in enumerate(ids) if token in prompt.end_ids), None)
        answers.append((model.tokenizer.decode(ids[:end]), end is not None))
    return answers


def overlap(text: str, wanted: str) -> float:
    """F1 of the characters that two texts have in common."""
    ours, theirs = Counter(text), Counter(wanted)
    common = sum((ours & theirs).values())
    return 2.0 * common / max(1, len(text) + len(wanted))


def keep(arguments, name: str, found: dict) -> None:
    path = arguments.out / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**results, name: found}, ensure_ascii=False, indent=1), encoding="utf-8")
    print(name, json.dumps({key: found[key] for key in ("before", "after")}, ensure_ascii=False))


def report(arguments: argparse.Namespace) -> None:
    """The table of everything that was measured."""
    results = json.loads((arguments.out / "results.json").read_text(encoding="utf-8"))
    first = next(iter(results.values()))
    note = f" {first['note']}." if first["note"] else ""
    lines = [
        "# Tuning on real text",
        "",
        f"{date.today()}, {platform.machine()}, {first['threads']} threads.{note} Made by "
        "`benchmarks/tuning.py`; loss is nats a scored token on held-out text.",
        "",
        "| | examples' tokens | seconds (wall, processor) | saved | loss before | after | ended by itself "
        "| in form | overlap with the poet or speaker |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        before, after = found["before"], found["after"]
        pairs = [
            f"{before[key]:.0%} → {after[key]:.0%}" if key in after else "" for key in ("ended", "in_form")
        ]
        lines.append(
            f"| {name} | {found['tokens']:,} | {found['wall_seconds']}, {found['processor_seconds']} "
            f"| {found['saved_bytes'] / 1e6:.2f} MB | {before['loss']:.4f} | **{after['loss']:.4f}** "
            f"| {pairs[0]} | {pairs[1]} | {before['overlap']:.3f} → {after['overlap']:.3f} |"
        )
    lines += ["", *share_of_gain(results), ""]
    for name, found in results.items():
        lines += [f"{name}, greedy, first held-out questions:", ""]
        lines += [f"- {question} → {one_line(text)}" for question, text in found["after"]["shown"]]
        lines.append("")
    text = "\n".join(lines).rstrip() + "\n"
    (REPOSITORY / "benchmarks" / "results" / "tuning.md").write_text(text, encoding="utf-8")
    print(text)


def share_of_gain(results: dict) -> list[str]:
    full = results.get("couplets full")
    lines = []
    for name in ("lora", "prompt"):
        found = results.get(f"couplets {name}")
        if full and found:
            gains = [one["before"]["loss"] - one["after"]["loss"] for one in (found, full)]
            lines.append(f"{name} reaches {gains[0] / gains[1]:.1%} of full tuning's gain on the couplets.")
    return lines


def one_line(text: str) -> str:
    return text.strip().replace("\n", " ⏎ ") or "(nothing)"


if __name__ == "__main__":
    main()
