"""``mtnlg demo``: the whole way once, on text that is already here."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtnlg.config.demo import DEMO_MINUTES
from mtnlg.config.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.training import TrainResult

EXAMPLE = """
mtnlg demo
mtnlg demo --minutes 10
mtnlg demo --force
"""
RESULT_FILE = "demo.json"


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the demo's few options."""
    parser.add_argument("--minutes", type=float, default=DEMO_MINUTES, help="of training")
    parser.add_argument("--run-dir", type=str, default="runs/demo", help="the folder that becomes the run")
    parser.add_argument("--force", action="store_true", help="begin anew, even where a finished demo is")


def run(arguments: Namespace) -> int:
    """Train, evaluate, write, draw; a finished demo is only shown again."""
    if not arguments.minutes > 0:
        raise ConfigError(f"--minutes is {arguments.minutes:g}: it must be greater than 0.")
    folder = Path(arguments.run_dir)
    finished = None if arguments.force else _read_result(folder)
    if finished and finished["minutes"] >= arguments.minutes:
        print(f"the demo in {folder} is finished; this is what came out (--force trains it again):\n")
        _show(finished, folder)
        return 0
    result = _train(folder, arguments.minutes, arguments.force)
    if result.exit_code:
        print(f"go on with:  mtnlg demo --minutes {arguments.minutes:g} --run-dir {folder}")
        return result.exit_code
    values = _look_at(folder, result, arguments.minutes)
    (folder / RESULT_FILE).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    _show(values, folder)
    return 0


def _train(folder: Path, minutes: float, fresh: bool) -> TrainResult:
    from mtnlg.cli.terminal import ProgressDisplay, note
    from mtnlg.cli.training_display import TrainingDisplay
    from mtnlg.config.demo import demo_config
    from mtnlg.corpus.demo_sources import gather_demo_sources
    from mtnlg.training import train

    note("gathering text: Python's documentation topics and library code, and Chinese verse and prose")
    sources = gather_demo_sources(folder / "corpus")
    if sources.chinese is None:
        note("note: the Chinese texts (data/zh of the checkout) are not here; training without them")
    config = demo_config(folder, sources.english, sources.code, sources.chinese, minutes)
    with ProgressDisplay() as progress:
        return train(config, [TrainingDisplay], progress, fresh=fresh)


def _look_at(folder: Path, result: TrainResult, minutes: float) -> dict[str, Any]:
    """Evaluate on the test split, write samples and draw the loss curve."""
    from mtnlg.api import MegatronLmModel
    from mtnlg.cli.terminal import ProgressDisplay
    from mtnlg.config.demo import DEMO_PROMPTS
    from mtnlg.evaluation import evaluate_run
    from mtnlg.training.loss_curve import draw_loss_curve

    model = MegatronLmModel.from_pretrained(folder)
    assert model.tokenizer is not None
    with ProgressDisplay() as progress:
        scores = evaluate_run(model, model.tokenizer, folder, "test", progress=progress)
    samples = [
        (prompt, model.generate(prompt, max_new_tokens=count, temperature=0.7, top_p=0.9, seed=1))
        for prompt, count in DEMO_PROMPTS.items()
    ]
    with (folder / "samples.txt").open("w", encoding="utf-8") as file:
        file.writelines(f"{text}\n\n" for _prompt, text in samples)
    picture = ""
    if find_spec("matplotlib"):
        picture = str(draw_loss_curve(folder, title="mtnlg demo"))
    return {
        "minutes": minutes,
        "steps": result.step,
        "tokens": result.tokens,
        "num_parameters": model.num_parameters,
        "test": scores.to_dict(),
        "samples": samples,
        "picture": picture,
    }


def _read_result(folder: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values


def _show(values: dict[str, Any], folder: Path) -> None:
    from mtnlg.cli.terminal import print_table, quantity

    print(
        f"{quantity(values['num_parameters'], 'parameters')}, {values['steps']} steps, "
        f"{quantity(values['tokens'], 'tokens')}, {values['minutes']:g} minutes of training\n"
    )
    names = ("perplexity", "bits_per_byte", "bits_per_character")
    rows = [
        [name.lstrip("0123456789-"), *(score[key] for key in names)]
        for name, score in values["test"]["sources"].items()
    ]
    rows.append(["together", *(values["test"][key] for key in names)])
    print_table(["held-out text", "perplexity", "bits/byte", "bits/character"], rows)
    print("\nWhat it writes (the prompt comes first):")
    for _prompt, text in values["samples"]:
        print("\n" + "\n".join(f"    {line}" for line in text.strip().splitlines()))
    if values["picture"]:
        print(f"\nThe loss curve is in {values['picture']}, the samples in {folder}/samples.txt.")
    print("\nNext:")
    print(f'  mtnlg generate {folder} "春天的早晨"')
    print(f"  mtnlg evaluate {folder} --split test")
    more = f"mtnlg demo --minutes {5 * values['minutes']:g} --run-dir {folder}"
    print(f"  {more}  # go on training the same model")
    print("  mtnlg train --help  # your own text: docs/train.md")
