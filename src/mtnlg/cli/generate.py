"""``mtnlg generate MODEL "PROMPT"``: continue a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mtnlg.cli.models import MODEL_HELP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.generation import Generation, TokenEvent

EXAMPLE = """
mtnlg generate runs/demo "春天的早晨" --temperature 0.7
mtnlg generate runs/demo "The value of" --max-new-tokens 40 --greedy
mtnlg generate runs/demo "The value of" --num-beams 4 --max-new-tokens 20
echo "class Reader:" | mtnlg generate runs/demo - --samples 3 --json
"""

# name, type, default, what it does; null leaves a rule out
DRAWING = (
    ("temperature", float, 0.8, "divides the logits; 0 is greedy"),
    ("top_k", int | None, None, "draw from so many tokens only"),
    ("top_p", float | None, 0.95, "draw from this much probability"),
    ("min_p", float | None, None, "leave out tokens less likely than so much of the likeliest"),
    ("typical_p", float | None, None, "draw from so much probability of typical tokens"),
    ("repetition_penalty", float | None, None, "divides the logits of tokens that were there"),
    ("frequency_penalty", float | None, None, "subtracted for each time that a token came"),
    ("presence_penalty", float | None, None, "subtracted once a token came"),
    ("no_repeat_ngram_size", int | None, None, "no sequence of so many tokens comes twice"),
    ("logit_bias", dict[int, float] | None, None, 'added to logits: {"TOKEN": NUMBER, ...}'),
    ("seed", int | None, None, "makes the draws repeatable"),
)
LENGTH = (
    ("max_new_tokens", int | None, 128, "length of the continuation"),
    ("max_length", int | None, None, "length of prompt and continuation in tokens"),
    ("min_new_tokens", int | None, None, "nothing ends it before so many tokens"),
)
SEARCHING = (
    ("num_beams", int | None, None, "beam search: sequences kept at each step"),
    ("num_beam_groups", int | None, None, "of them, groups that keep apart"),
    ("diversity_penalty", float | None, None, "how far groups keep apart"),
    ("length_penalty", float | None, None, "above 1 favours long sequences, below 1 short ones"),
    ("early_stopping", bool | Literal["never"] | None, None, "true ends at enough finished sequences"),
    ("penalty_alpha", float | None, None, "contrastive search: weight of not repeating; with --top-k"),
)
FORMS = (
    ("json_schema", "file with a JSON schema, or the schema"),
    ("regex", "regular expression that the continuation matches"),
    ("grammar", "file with a Lark or GBNF grammar, or the grammar"),
    ("verse", "Chinese verse form that the continuation keeps, such as 五言绝句"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the model, the prompt, the rules, what to print, and the engine."""
    from mtnlg.cli.engine_options import add_engine_arguments
    from mtnlg.cli.models import add_adapter_argument
    from mtnlg.cli.ranks import add_rank_arguments

    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("prompt", metavar="PROMPT", help="the text to continue; - reads it from stdin")
    for name, kind, default, what in (*LENGTH, *DRAWING, *SEARCHING):
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=what)
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--stop", type=str, action="append", default=[], help="a text that ends it; may come again")
    for name, what in FORMS:
        add(f"--{name.replace('_', '-')}", type=str | None, default=None, help=what)
    add("--json-object", action="store_true", help="the continuation is some JSON object")
    add("--choice", type=str, action="append", default=[], help="it is one of these; may come again")
    add("--samples", type=int, default=1, help="how many continuations to write")
    add("--best-of", type=int | None, default=None, help="draw so many and write the likeliest")
    add("--logprobs", type=int | None, default=None, help="with --json: so many alternatives of each token")
    add("--json", action="store_true", help="one JSON object for each continuation")
    add("--use-cache", type=bool, default=True, help="keep keys and values")
    add("--deadline", type=float | None, default=None, help="stop after so many seconds")
    add_adapter_argument(parser)
    add("--device", type=str | None, default=None, help="cpu or cuda; null is the best one")
    add_engine_arguments(parser)
    add_rank_arguments(parser)


def run(arguments: Namespace) -> int:
    """Write the prompt's continuations, the first one piece by piece as it comes."""
    from mtnlg.cli.ahead import begin_kernels, loading
    from mtnlg.cli.engine_options import engine_config
    from mtnlg.cli.models import open_model
    from mtnlg.config import ConfigError

    if arguments.samples < 1:
        raise ConfigError(f"--samples is {arguments.samples}: it must be at least 1.")
    if arguments.logprobs is not None and not arguments.json:
        raise ConfigError(f"--logprobs is {arguments.logprobs}: it needs --json.")
    begin_kernels(arguments)
    config, options = engine_config(arguments), _options(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    prompt = prompt.removesuffix("\n") if arguments.prompt == "-" else prompt
    with loading():
        model, tokenizer = open_model(arguments.model, arguments.device, arguments)
    written = "" if model.config.has_encoder else prompt  # an answer does not go on with what was read
    model.engine_config = config
    printer = None
    if not arguments.json and not _is_chosen_at_the_end(arguments):
        printer = Printer(written, arguments.samples)
        options["listener"] = printer.hear
    found = model.generate(prompt, n=arguments.samples, details=True, **options)
    if arguments.json:
        _print_json(prompt, written, found, tokenizer.decode, arguments.logprobs is not None)
    elif printer is None:
        for generation in found:
            print(written + generation.text)
    return 0


def _options(arguments: Namespace) -> dict[str, Any]:
    names = [name for name, *_ in (*LENGTH, *DRAWING, *SEARCHING)]
    options = {name: getattr(arguments, name) for name in names}
    for name, _what in FORMS:
        options[name] = _text_or_file(getattr(arguments, name), name)
    options |= {
        "stop": arguments.stop,
        "json_object": arguments.json_object,
        "choice": arguments.choice or None,
        "best_of": arguments.best_of,
        "logprobs": arguments.logprobs,
        "deadline_seconds": arguments.deadline,
        "use_cache": arguments.use_cache,
    }
    is_search = (arguments.num_beams or 1) > 1 or arguments.penalty_alpha is not None
    if arguments.greedy or arguments.temperature == 0 or is_search:
        chance = ("top_p", "min_p", "typical_p", "seed", *(() if is_search else ("top_k",)))
        options |= {"temperature": 0.0, **dict.fromkeys(chance)}
    return options


def _text_or_file(value: str | None, name: str) -> str | None:
    """A schema or grammar, read from where it stands if that is a file."""
    from mtnlg.config import ConfigError

    if value is None or name in ("regex", "verse") or len(value) > 255 or "\n" in value:
        return value
    path, option = Path(value), "--" + name.replace("_", "-")
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} is {value!r}: the file cannot be read: {error}.") from error
    if name == "json_schema" and value.strip()[:1] != "{" and value.strip() not in ("true", "false"):
        raise ConfigError(f"{option} is {value!r}: there is no such file, and a schema begins with {{.")
    if name == "grammar" and ":" not in value:
        raise ConfigError(
            f"{option} is {value!r}: there is no such file, and a grammar has a rule start: or root ::=."
        )
    return value


def _is_chosen_at_the_end(arguments: Namespace) -> bool:
    """Whether what is written is known only when all is over."""
    is_search = (arguments.num_beams or 1) > 1 or arguments.penalty_alpha is not None
    return is_search or arguments.best_of is not None


class Printer:
    """Writes continuations below each other while they are generated beside each other.

    Args:
        prompt: written before each of them.
        count: how many there will be.
    """

    def __init__(self, prompt: str, count: int) -> None:
        self._prompt, self._count = prompt, count
        self._current = -1  # whose text goes out as it comes; those after it are kept until their turn
        self._kept: dict[int, str] = {}
        self._ended: set[int] = set()

    def hear(self, number: int, event: TokenEvent) -> None:
        """Take what has become known of a continuation."""
        if self._current < 0:  # nothing is written before it is known that the request can be answered
            self._go_on()
        if number == self._current:
            self._write(event.text)
        else:
            self._kept[number] = self._kept.get(number, "") + event.text
        if event.finish_reason is not None:
            self._ended.add(number)
        while self._current in self._ended:
            self._write("\n")
            self._go_on()

    def _go_on(self) -> None:
        self._current += 1
        if self._current < self._count:
            self._write(self._prompt + self._kept.pop(self._current, ""))

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()


def _print_json(
    prompt: str, written: str, found: Sequence[Generation], decode: Any, with_scores: bool
) -> None:
    import json

    for generation in found:
        record: dict[str, Any] = {
            "prompt": prompt,
            "text": written + generation.text,
            "finish_reason": generation.finish_reason,
            "new_tokens": len(generation.new_ids),
        }
        if with_scores:
            record["logprobs"] = [
                {
                    "token": decode([token]),
                    "logprob": score.logprob,
                    "top": [[decode([other]), logprob] for other, logprob in score.top],
                }
                for token, score in zip(generation.new_ids, generation.logprobs)
            ]
        print(json.dumps(record, ensure_ascii=False))
