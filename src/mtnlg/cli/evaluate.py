"""``mtnlg evaluate MODEL``: perplexity, bits per byte and per character."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtnlg.cli.models import MODEL_HELP

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.config.progress import Progress
    from mtnlg.evaluation import PerplexityResult

EXAMPLE = """
mtnlg evaluate runs/demo
mtnlg evaluate runs/demo --split test --json
mtnlg evaluate runs/demo --files data/zh --stride 128
"""
MEASURES = ("loss", "perplexity", "bits_per_byte", "bits_per_character")


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the model and what to measure it on."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--split", type=str, default="validation", help="of the run's data: train, validation, test or all"
    )
    parser.add_argument("--files", nargs="+", default=[], metavar="SOURCE", help="text instead of a split")
    parser.add_argument("--text-key", type=str, default="text", help="field of the files that holds text")
    parser.add_argument("--encoding-errors", type=str, default="strict", help="strict, replace or ignore")
    parser.add_argument("--max-tokens", type=int | None, default=None, help="the first tokens of each text")
    parser.add_argument("--window", type=int | None, default=None, help="longest input, tokens")
    parser.add_argument("--stride", type=int | None, default=None, help="tokens from window to window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows run through the model at once")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; null is the best one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: Namespace) -> int:
    """Measure and print."""
    from mtnlg.cli.terminal import ProgressDisplay

    with ProgressDisplay() as progress:
        result = _measure(arguments, progress)
    if arguments.json:
        import json

        print(json.dumps({"model": arguments.model, **result.to_dict()}, ensure_ascii=False))
    else:
        _print(result)
    return 0


def _measure(arguments: Namespace, progress: Progress) -> PerplexityResult:
    from mtnlg.cli.models import open_model, run_folder
    from mtnlg.config import ConfigError

    folder = None if arguments.files else run_folder(arguments.model)
    from mtnlg.evaluation import evaluate_files, evaluate_run

    model, tokenizer = open_model(arguments.model, arguments.device)
    if model.config.architecture == "encoder_decoder":
        raise ConfigError(
            f"{arguments.model} is an encoder-decoder, and this scores texts that a decoder continues: "
            "what an encoder-decoder loses on its own objective is in its run's metrics."
        )
    options = _picked(arguments, "max_tokens", "window", "stride", "batch_size")
    if folder is not None:
        return evaluate_run(model, tokenizer, folder, arguments.split, progress=progress, **options)
    options |= _picked(arguments, "text_key", "encoding_errors")
    return evaluate_files(model, tokenizer, arguments.files, progress=progress, **options)


def _picked(arguments: Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _print(result: PerplexityResult) -> None:
    from mtnlg.cli.terminal import duration, print_table, quantity

    rows = [
        [
            name,
            score.num_tokens,
            score.loss,
            score.perplexity,
            score.bits_per_byte,
            score.bits_per_character,
        ]
        for name, score in [*result.sources.items(), ("together", result.total)]
    ]
    rows = rows[:-1] if len(result.sources) == 1 else rows
    print_table(["text", "tokens", *MEASURES], rows)
    rate = quantity(result.total.num_tokens / max(result.seconds, 1e-9), "tokens")
    print(f"windows of {result.window} tokens, {duration(result.seconds)}, {rate}/s")
