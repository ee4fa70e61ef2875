"""``mtnlg train CONFIG``: train a model from a recipe; the same command goes on after an interruption."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.config import RunConfig
    from mtnlg.training import TrainResult

EXAMPLE = """
mtnlg train recipes/poems.yaml --data.sources poems.jsonl --run_dir runs/poems
mtnlg train recipes/poems.yaml --data.sources poems.jsonl --stop.minutes=15 --precision.dtype bf16
mtnlg train recipes/poems.yaml --data.sources poems.jsonl --layout.tensor_parallel_size 2
mtnlg train recipes/poems.yaml --data.sources poems.jsonl --layout=auto
mtnlg train runs/poems/config.yaml
"""
SWITCHES = ("print_config", "prepare", "fresh")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the recipe, and every setting of a run with its help from the typed configs."""
    from mtnlg.config.run import RunConfig

    parser.add_argument(
        "config", metavar="CONFIG", help="a recipe, or the config.yaml of a run to go on with"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    parser.add_argument(
        "--prepare", action="store_true", help="make tokenizer, token files and index; stop"
    )
    parser.add_argument("--fresh", action="store_true", help="drop the run's checkpoints and begin anew")
    parser.add_class_arguments(RunConfig, None)


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """The command line as a ``RunConfig``.

    The recipe and all overrides are read by ``load_run_config``, which finds all of their problems
    at once; the parser itself serves the help.
    """
    from jsonargparse import Namespace

    from mtnlg.config.load import load_run_config

    if not arguments or "-h" in arguments or "--help" in arguments:
        parser.parse_args(arguments)  # prints the help, or says that CONFIG is missing, and exits
    switches = dict.fromkeys(SWITCHES, False)
    recipe: str | None = None
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
            overrides.append(argument)
            waits_for_value = "=" not in argument
        elif recipe is None:
            recipe = argument
        else:
            parser.error(f"{argument!r} is one argument too many: CONFIG is {recipe!r} already")
    if recipe is None:
        parser.error("CONFIG is missing: name a recipe, e.g. recipes/poems.yaml")
    return Namespace(run_config=load_run_config(recipe, overrides, _defaults), **switches)


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """What lies under a recipe: nothing, or the base of a run that tunes one."""
    if not values.get("tuning"):
        return {}  # without importing torch
    from mtnlg.tuning.defaults import tuning_defaults

    return tuning_defaults(values)


def run(arguments: Namespace) -> int:
    """Train, with live progress, and say what to do next."""
    if arguments.run_config.tuning is not None:
        from mtnlg.cli import tune

        return tune.run(arguments)
    config = with_layout(arguments.run_config)
    if arguments.print_config:
        from mtnlg.config.load import dump_run_config

        print(dump_run_config(config), end="")
        return 0
    from mtnlg.cli.terminal import ProgressDisplay

    if arguments.prepare:
        from mtnlg.training import prepare

        with ProgressDisplay() as progress:
            prepare(config, progress)
        print(f"{config.run_dir} is prepared; train it with: mtnlg train {config.run_dir}/config.yaml")
        return 0
    from mtnlg.cli.training_display import TrainingDisplay
    from mtnlg.training import train

    with ProgressDisplay() as progress:
        result = train(config, [TrainingDisplay], progress, fresh=arguments.fresh)
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        _say_what_is_next(result)
    return result.exit_code


def with_layout(config: RunConfig) -> RunConfig:
    """``config`` with ``layout: auto`` resolved, and why it became what it is."""
    if not config.layout.auto:
        return config  # without importing torch
    from mtnlg.planning import resolve_auto_layout

    config, reasons = resolve_auto_layout(config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(["layout: auto", *(f"  {reason}" for reason in reasons)]), file=sys.stderr)
    return config


def _say_what_is_next(result: TrainResult) -> None:
    if result.validation_loss is not None:
        print(f"validation loss {result.validation_loss:.4f} nats a token")
    if result.exit_code:
        print(f"go on with:  mtnlg train {result.run_dir}/config.yaml")
        return
    print(f"the model is in {result.run_dir}. Next:")
    print(f"  mtnlg evaluate {result.run_dir}")
    print(f'  mtnlg generate {result.run_dir} "..."')
