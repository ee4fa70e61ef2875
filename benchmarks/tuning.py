"""What tuning does to small models on real text, before and after, with held-out text judging.

    python benchmarks/tuning.py all --data ../shared/data
    python benchmarks/tuning.py couplets --data ../shared/data

poem-base  a model to tune: recipes/poems.yaml, on poems that are not held out.
dialogue-base  recipes/dialogue-base.yaml on the turns and facts of KdConv's dev files and on prose.
rates      a learning rate for each method: the best of three on couplets kept for that; DoRA and QLoRA
           take LoRA's.
couplets   recipes/tune-couplets.yaml: the next line on instruction, by every method with the same examples
           and steps; full tuning, LoRA, DoRA, QLoRA (int4), 20 virtual tokens, a prefix of 20.
dialogues  recipes/tune-dialogues.yaml: KdConv's dev files are learnt, its test files are held out.
distill    a student of a quarter of the size learns the couplets from nothing: from their labels alone, and
           from the logits of the model that `couplets` made by full tuning too, in the same steps.
report     benchmarks/results/tuning.md from everything measured; `all` is all of these in turn.

Loss is the mean over the scored tokens of up to 16,384 held-out tokens, in samples as training reads
them. Answers are greedy. Everything that is measured goes into OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tuning_data import kdconv, write_couplets, write_dialogue_text, write_poems
from tuning_measures import (
    NUM_SHOWN,
    answer_all,
    common_scores,
    couplet_scores,
    in_verse,
    sample_loss,
    text_loss,
)
from tuning_report import write_report

REPOSITORY = Path(__file__).resolve().parent.parent
LORA = ["--tuning.method=lora", "--tuning.adapter.target_modules=[all-linear]"]
METHODS = {
    "full": [],
    "lora": LORA,
    "dora": [*LORA, "--tuning.adapter.decomposed=true"],
    "qlora": [*LORA, "--model.quantize=true", "--model.quantize_config={weights: int4}"],
    "prompt": ["--tuning.method=prompt", "--tuning.adapter.num_virtual_tokens=20"],
    "prefix": ["--tuning.method=prefix", "--tuning.adapter.num_virtual_tokens=20"],
}
RATES = {
    "full": (1e-3, 2e-3, 4e-3),
    "lora": (4e-3, 8e-3, 1.6e-2),
    "prompt": (3e-2, 0.1, 0.3),
    "prefix": (2e-2, 6e-2, 0.2),
}
AS_LORA = ("dora", "qlora")  # their matrices are LoRA's, and so is the rate
STUDENT_RATE = 4e-3
MIXTURES = {"labels alone": None, "half teacher, T 1": (0.5, 1.0), "half teacher, T 2": (0.5, 2.0)}
NUM_ANSWERS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "report", "all"))
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with poems/ and zh/"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--minutes", type=float, default=10.0, help="to train each base")
    parser.add_argument("--base-steps", type=int, help="steps of each base, instead of minutes")
    parser.add_argument("--poem-base", type=Path, help="tune this run instead of OUT/poem-base")
    parser.add_argument("--dialogue-base", type=Path, help="likewise")
    parser.add_argument("--examples", type=int, default=3000, help="couplets to learn from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--note", default="", help="about the machine, for the report")
    parser.add_argument("--override", action="append", default=[], help="of the recipe: --a.b=value")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.poem_base = arguments.poem_base or arguments.out / "poem-base"
    arguments.dialogue_base = arguments.dialogue_base or arguments.out / "dialogue-base"
    torch.set_num_threads(arguments.threads)
    for name, part in PARTS.items():
        if arguments.part in (name, "all"):
            part(arguments)
    write_report(arguments.out, REPOSITORY / "benchmarks" / "results" / "tuning.md")


def poem_base(arguments: argparse.Namespace) -> None:
    """A model of poems, and its loss on held-out ones."""
    poems, held_out = write_poems(arguments.data, arguments.out / "data")
    sources = [{"path": str(poems), "text_key": "paragraphs"}]
    pretrain(arguments, "poems", arguments.poem_base, sources)
    keep_base(arguments, "poem base", arguments.poem_base, held_out)


def dialogue_base(arguments: argparse.Namespace) -> None:
    """A model of what dialogues are made of, and of prose."""
    sources = write_dialogue_text(arguments.data, arguments.out / "data")
    pretrain(arguments, "dialogue-base", arguments.dialogue_base, sources)
    keep_base(arguments, "dialogue base", arguments.dialogue_base, None)


def pretrain(arguments, recipe: str, run_dir: Path, sources: list[dict]) -> None:
    """What ``mtnlg train recipes/RECIPE.yaml`` does."""
    from mtnlg.config.load import load_run_config
    from mtnlg.training import train

    steps = arguments.base_steps
    budget = [f"--stop.minutes={arguments.minutes}"]
    if steps:
        budget = [f"--stop.steps={steps}", "--stop.minutes=null"]
    given = [
        f"--run_dir={run_dir}",
        f"--data.sources={json.dumps(sources)}",
        f"--training.num_threads={arguments.threads}",
    ]
    train(load_run_config(REPOSITORY / "recipes" / f"{recipe}.yaml", [*given, *budget]))


def keep_base(arguments, name: str, path: Path, held_out: Path | None) -> None:
    """Record what a base is and how good."""
    from mtnlg import MegatronLmModel
    from mtnlg.training.saved_run import open_run

    model = MegatronLmModel.from_pretrained(path)
    state = open_run(path).state
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": model.tokenizer.vocab_size,
        **{key: state[key] for key in ("step", "tokens", "seconds", "validation_loss")},
        **({} if held_out is None else text_loss(model, held_out)),
    }
    keep(arguments, name, found)


def couplet_files(arguments: argparse.Namespace) -> dict[str, str]:
    counts = {"train": arguments.examples, "validation": 200, "held-out": 400}
    found = write_couplets(arguments.data, arguments.out / "data", counts)
    return {name: str(path) for name, path in found.items()}


def rates(arguments: argparse.Namespace) -> None:
    """Which learning rate suits each method: a third of the steps, judged on the couplets kept for it."""
    files = couplet_files(arguments)
    for method in RATES.keys() & set(arguments.methods):
        losses = {}
        for rate in RATES[method]:
            overrides = [*METHODS[method], f"--optimizer.learning_rate={rate}", "--tuning.epochs=0.34"]
            chosen = (files["train"], files["validation"])
            config = configure(
                arguments, "couplets", f"rates-{method}", arguments.poem_base, chosen, overrides
            )
            losses[str(rate)] = tune(config)["validation_loss"]
        keep(arguments, f"rates {method}", losses)


def best_rate(arguments: argparse.Namespace, method: str) -> float:
    """The one that ``rates`` found, or else the middle one."""
    method = "lora" if method in AS_LORA else method
    losses = results_of(arguments).get(f"rates {method}")
    return float(min(losses, key=losses.get)) if losses else RATES[method][1]


def couplets(arguments: argparse.Namespace) -> None:
    """Every method on the same couplets, each with its own learning rate."""
    files = couplet_files(arguments)
    for method in arguments.methods:
        rate = best_rate(arguments, method)
        overrides = [*METHODS[method], f"--optimizer.learning_rate={rate}"]
        chosen, name = (files["train"], files["held-out"]), f"couplets-{method}"
        config = configure(arguments, "couplets", name, arguments.poem_base, chosen, overrides)
        found = tune_and_judge(arguments, config, is_couplet=True)
        keep(arguments, f"couplets {method}", {"learning_rate": rate, **found})


def dialogues(arguments: argparse.Namespace) -> None:
    """KdConv before and after."""
    files = (kdconv(arguments.data, "dev"), kdconv(arguments.data, "test"))
    config = configure(arguments, "dialogues", "dialogues", arguments.dialogue_base, files, [])
    keep(arguments, "dialogues full", tune_and_judge(arguments, config, is_couplet=False))


def distill(arguments: argparse.Namespace) -> None:
    """A student with and without a teacher's logits, from the same drawn weights in the same steps."""
    from mtnlg import MegatronLmModel
    from mtnlg.config import MegatronModelConfig
    from mtnlg.training.model_files import open_model_files

    files = couplet_files(arguments)
    teacher = arguments.out / "couplets-full"
    big = open_model_files(teacher)
    shape = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 256}
    fields = {**vars(big.config), **shape}
    for derived in ("kv_channels", "head_dim", "num_key_value_heads"):
        fields.pop(derived, None)
    nothing = arguments.out / "student"
    MegatronLmModel(MegatronModelConfig(**fields), big.tokenizer).save_pretrained(nothing)
    for number, (name, mixture) in enumerate(MIXTURES.items()):
        if f"student, {name}" in results_of(arguments):
            continue  # of a part that was interrupted
        overrides = [f"--optimizer.learning_rate={STUDENT_RATE}"]
        if mixture:
            overrides += [
                f"--tuning.distillation.teacher={teacher}",
                f"--tuning.distillation.share={mixture[0]}",
                f"--tuning.distillation.temperature={mixture[1]}",
            ]
        chosen = (files["train"], files["held-out"])
        config = configure(arguments, "couplets", f"student-{number}", nothing, chosen, overrides)
        keep(arguments, f"student, {name}", tune_and_judge(arguments, config, is_couplet=True))


def configure(arguments, recipe: str, name: str, base: Path, files, overrides: list[str]):
    """The recipe with its data, learnt and held out."""
    from mtnlg.config.load import load_run_config
    from mtnlg.tuning import tuning_defaults

    learnt, held_out = ([one] if isinstance(one, str) else one for one in files)
    given = [
        f"--run_dir={arguments.out / name}",
        f"--tuning.base={base}",
        f"--tuning.data={json.dumps(learnt)}",
        f"--tuning.validation_data={json.dumps(held_out)}",
        f"--training.num_threads={arguments.threads}",
        "--training.device=cpu",
    ]
    path = REPOSITORY / "recipes" / f"tune-{recipe}.yaml"
    return load_run_config(path, [*given, *overrides, *arguments.override], tuning_defaults)


def tune(config) -> dict:
    """Tune; how it went."""
    from mtnlg.training import train
    from mtnlg.tuning import Tuning

    began = (time.perf_counter(), time.process_time())
    result = train(config, work=Tuning(), fresh=True)
    if result.exit_code:
        raise SystemExit(result.exit_code)  # half a run is no result
    weights = Path(result.checkpoint) / "weights"
    return {
        "steps": result.step,
        "tokens": result.tokens,
        "wall_seconds": round(time.perf_counter() - began[0]),
        "processor_seconds": round(time.process_time() - began[1]),
        "saved_bytes": sum(file.stat().st_size for file in weights.iterdir()),
        "validation_loss": result.validation_loss,
    }


def tune_and_judge(arguments, config, is_couplet: bool) -> dict:
    """Tune; held-out loss and answers before and after."""
    from mtnlg.training.loop import forget
    from mtnlg.tuning import Tuning

    forget(config.run_dir)
    config = Tuning(print).prepare(config, lambda *_: None)
    facts = {"base": str(config.tuning.base), "held_out": config.tuning.validation_data}
    known = [one for one in results_of(arguments).values() if facts.items() <= one.items()]
    before = known[0]["before"] if known else judge(config, facts["base"], is_couplet)
    how = tune(config)
    after = judge(config, config.run_dir, is_couplet, with_verse=True)
    facts |= {"threads": arguments.threads, "note": arguments.note}
    return {**how, "before": before, "after": after, **facts}


def judge(config, path: str, is_couplet: bool, with_verse: bool = False) -> dict:
    """Loss on held-out samples, and greedy answers to some."""
    from mtnlg import MegatronLmModel, Tokenizer
    from mtnlg.tuning import Tuning

    model = MegatronLmModel.from_pretrained(path)
    model.tokenizer = Tokenizer.from_pretrained(Path(config.run_dir) / "tokenizer")
    found = sample_loss(model, Tuning().validation_stream(config, None), config.data.sequence_length)
    asked = held_out(config)
    questions, wanted = [messages for messages, _ in asked], [answer for _, answer in asked]
    last = [messages[-1]["content"].split("\n")[-1] for messages in questions]
    answers = answer_all(model, questions)
    shown = [[*pair] for pair in zip(last, (text for text, _ in answers), wanted)]
    if not is_couplet:
        return {**found, **common_scores(answers, wanted), "shown": shown[:NUM_SHOWN]}
    found |= couplet_scores(last, answers, wanted)
    found["poet"] = couplet_scores(last, [(answer, True) for answer in wanted], wanted)
    if with_verse:
        verse = in_verse(model, questions, [len(upper) for upper in last])
        found["verse"] = couplet_scores(last, verse, wanted)
        shown = [[*one, text] for one, (text, _) in zip(shown, verse)]
    return {**found, "shown": shown[:NUM_SHOWN]}


def held_out(config) -> list[tuple[list[dict], str]]:
    """Conversations up to their last answer, with that answer."""
    from mtnlg.tuning import read_conversations

    tuning = config.tuning
    found = read_conversations(tuning.validation_data, tuning.format, tuning.system, tuning.max_turns)
    chosen = found[:: max(1, len(found) // NUM_ANSWERS)][:NUM_ANSWERS]
    return [(one.messages[:-1], one.messages[-1]["content"]) for one in chosen]


def results_of(arguments: argparse.Namespace) -> dict:
    path = arguments.out / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(arguments: argparse.Namespace, name: str, found: dict) -> None:
    path, results = arguments.out / "results.json", {**results_of(arguments), name: found}
    path.write_text(json.dumps(results, ensure_ascii=False, indent=1), encoding="utf-8")
    print(name, json.dumps(found, ensure_ascii=False), flush=True)


PARTS = {
    "poem-base": poem_base,
    "dialogue-base": dialogue_base,
    "rates": rates,
    "couplets": couplets,
    "dialogues": dialogues,
    "distill": distill,
}

if __name__ == "__main__":
    main()
