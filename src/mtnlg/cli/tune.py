"""``mtnlg tune MODEL DATA``: go on training a model, on conversations; the same command resumes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.training import TrainResult

EXAMPLE = """
mtnlg tune runs/demo chats.jsonl --out runs/chat
mtnlg tune runs/demo chats.jsonl --method lora --tuning.adapter.rank 16 --epochs 2
mtnlg tune runs/demo chats.jsonl --method qlora --out runs/chat-qlora
mtnlg tune runs/demo chats.jsonl --method prompt --learning-rate 0.01
mtnlg tune runs/demo chats.jsonl --teacher runs/chat --out runs/student
mtnlg tune recipes/tune-dialogues.yaml runs/demo film_dev.json music_dev.json
"""
# Short names of what is asked for most; every other setting goes by its own (mtnlg train --help).
SHORT = {
    "method": "tuning.method",
    "out": "run_dir",
    "epochs": "tuning.epochs",
    "learning-rate": "optimizer.learning_rate",
    "format": "tuning.format",
    "template": "tuning.template",
    "system": "tuning.system",
    "teacher": "tuning.distillation.teacher",
}
# What others call methods of their own, in our settings.
NAMED_METHODS = {
    "dora": ("--tuning.adapter.decomposed=true",),
    "qlora": ("--model.quantize=true", "--model.quantize_config={weights: int4}"),
    "rslora": ("--tuning.adapter.rank_stabilized=true",),
}
SWITCHES = ("print_config", "prepare", "fresh")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare model, data and the short options."""
    from mtnlg.cli.models import MODEL_HELP
    from mtnlg.config.tuning import DATA_FORMATS, METHODS

    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; or a recipe with a section tuning")
    parser.add_argument("data", metavar="DATA", nargs="*", help="JSON Lines or JSON files of conversations")
    for name, what in (
        (
            "method",
            f"what is trained: {', '.join(METHODS)}; full is every weight; {', '.join(NAMED_METHODS)} are "
            "lora with a setting more",
        ),
        ("out", "the folder that becomes the run; null is runs/MODEL-METHOD"),
        ("epochs", "how often the data is read; null is 3, unless stop.* says when to end"),
        ("learning-rate", "its peak; null is the method's, higher for small models"),
        ("format", f"of DATA: {', '.join(DATA_FORMATS)}"),
        ("template", "a file with the jinja2 chat template; null is the model's, or ours"),
        ("system", "system message of conversations that have none"),
        ("teacher", "a larger model with the same vocabulary: learn from its logits too"),
    ):
        parser.add_argument(f"--{name}", type=str | None, default=None, help=what)
    parser.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    parser.add_argument("--prepare", action="store_true", help="show what would be learnt and stop")
    parser.add_argument("--fresh", action="store_true", help="drop the run's checkpoints and begin anew")
    parser.add_argument(
        "--SECTION.SETTING",
        dest="setting",
        metavar="VALUE",
        default=None,
        help="any setting of a run, such as --tuning.loss_on last or --batch.micro_batch_size 2",
    )


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """The command line as a ``RunConfig``; the parser itself serves the help."""
    from jsonargparse import Namespace

    if not arguments or "-h" in arguments or "--help" in arguments:
        parser.parse_args(arguments)  # prints the help, or says what is missing, and exits
    # Not for the help: they import torch.
    from mtnlg.config.load import load_run_config
    from mtnlg.tuning.defaults import tuning_defaults

    switches = dict.fromkeys(SWITCHES, False)
    words: list[str] = []
    overrides: list[str] = []
    waits_for_value = False
    for argument in arguments:
        name = argument.removeprefix("--").replace("-", "_")
        if waits_for_value:
            overrides.append(argument)
            waits_for_value = False
        elif argument.startswith("--") and name in SWITCHES:
            switches[name] = True
        elif argument.startswith("--"):
            overrides.append(_in_full(argument))
            waits_for_value = "=" not in argument
        else:
            words.append(argument)
    recipe = words.pop(0) if words and words[0].endswith((".yaml", ".yml")) else None
    if recipe is None and not words:
        parser.error("MODEL is missing: name a run, a Hugging Face folder or a recipe")
    if words:
        overrides.append(f"--tuning.base={words[0]}")
    if words[1:]:
        import json

        overrides.append(f"--tuning.data={json.dumps(words[1:], ensure_ascii=False)}")
    overrides = _with_settings_of_method(overrides)
    return Namespace(run_config=load_run_config(recipe, overrides, tuning_defaults), **switches)


def _with_settings_of_method(overrides: list[str]) -> list[str]:
    """``--tuning.method=dora`` as lora and the setting that makes it that."""
    for place, word in enumerate(overrides):
        name, equals, value = word.partition("=")
        if name != "--tuning.method":
            continue
        rest = overrides[place + 1 :]
        if not equals:
            value, rest = (rest or [""])[0], rest[1:]
        if value in NAMED_METHODS:
            return [*overrides[:place], "--tuning.method=lora", *NAMED_METHODS[value], *rest]
    return overrides


def run(arguments: Namespace) -> int:
    """Show what is learnt, train with live progress, and say what to do next."""
    from mtnlg.cli.train import with_layout

    config = with_layout(arguments.run_config)
    if arguments.print_config:
        from mtnlg.config.load import dump_run_config

        print(dump_run_config(config), end="")
        return 0
    from mtnlg.cli.terminal import ProgressDisplay
    from mtnlg.tuning import Tuning

    if arguments.prepare:
        with ProgressDisplay() as progress:
            Tuning(print).prepare(config, progress)
        print(f"{config.run_dir} is prepared; tune it with: mtnlg train {config.run_dir}/config.yaml")
        return 0
    from mtnlg.cli.training_display import TrainingDisplay
    from mtnlg.training import train

    with ProgressDisplay() as progress:
        result = train(config, [TrainingDisplay], progress, fresh=arguments.fresh, work=Tuning(print))
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        say_what_is_next(result)
    return result.exit_code


def say_what_is_next(result: TrainResult) -> None:
    """After a tuning run."""
    if result.validation_loss is not None:
        before = result.first_validation_loss
        was = "" if before is None else f"; before tuning it was {before:.4f}"
        print(f"validation loss {result.validation_loss:.4f} nats a scored token{was}")
    if result.exit_code:
        print(f"go on with:  mtnlg train {result.run_dir}/config.yaml")
        return
    print(f"the model is in {result.run_dir}. Next:")
    print(f"  mtnlg chat {result.run_dir}")
    print(f"  mtnlg serve {result.run_dir}")


def _in_full(argument: str) -> str:
    """``--method=lora`` as ``--tuning.method=lora``."""
    name, equals, value = argument.removeprefix("--").partition("=")
    return f"--{SHORT.get(name, name)}{equals}{value}"
