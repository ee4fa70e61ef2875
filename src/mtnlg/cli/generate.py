"""``mtnlg generate MODEL "PROMPT"``: continue a text."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mtnlg.cli.models import MODEL_HELP
from mtnlg.cli.ranks import add_rank_arguments

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

EXAMPLE = """
mtnlg generate runs/demo "春天的早晨" --temperature 0.7
mtnlg generate runs/demo "The value of" --max-new-tokens 40 --greedy
echo "class Reader:" | mtnlg generate runs/demo - --samples 3 --json
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the model, the prompt and the sampling rules."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="length of the continuation")
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--temperature", type=float, default=0.8, help="divides the logits; 0 is greedy")
    parser.add_argument("--top-k", type=int | None, default=None, help="draw from so many tokens only")
    parser.add_argument("--top-p", type=float | None, default=0.95, help="draw from this much probability")
    parser.add_argument("--seed", type=int | None, default=None, help="makes the draws repeatable")
    parser.add_argument("--samples", type=int, default=1, help="how many continuations to write")
    parser.add_argument("--use-cache", type=bool, default=True, help="keep keys and values")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; null is the best one")
    add_rank_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object for each continuation")


def run(arguments: Namespace) -> int:
    """Write the prompt's continuation, piece by piece as it comes."""
    from mtnlg.cli.models import open_model
    from mtnlg.config import ConfigError

    if arguments.samples < 1:
        raise ConfigError(f"--samples is {arguments.samples}: it must be at least 1.")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt = prompt.removesuffix("\n") if arguments.prompt == "-" else prompt
    model, _tokenizer = open_model(arguments.model, arguments.device, arguments)
    options = _sampling_options(arguments)
    for number in range(arguments.samples):
        if arguments.seed is not None:
            options["seed"] = arguments.seed + number
        if arguments.json:
            _print_json(prompt, model.generate(prompt, **options))
        else:
            _stream(model, prompt, options)
    return 0


def _sampling_options(arguments: Namespace) -> dict[str, Any]:
    options = {"max_new_tokens": arguments.max_new_tokens, "use_cache": arguments.use_cache}
    if arguments.greedy or arguments.temperature == 0:
        return {**options, "temperature": 0.0}
    rules = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p}
    return {**options, **rules}


def _stream(model: Any, prompt: str, options: dict[str, Any]) -> None:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    write(prompt)
    model.generate(prompt, streamer=write, **options)
    write("\n")


def _print_json(prompt: str, text: str) -> None:
    import json

    print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False))
