"""``mtnlg chat MODEL``: talk with a model in the terminal, or through a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mtnlg.cli.models import MODEL_HELP

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from mtnlg.api import MegatronLmModel
    from mtnlg.generation.dialogue import Dialogue
    from mtnlg.tokens import Tokenizer

EXAMPLE = """
mtnlg chat runs/demo
mtnlg chat runs/demo --persona poet-zh --temperature 0.7
echo "春天在哪里？" | mtnlg chat runs/demo --max-new-tokens 60
echo "Who are you?" | mtnlg chat runs/demo --system "You are a river." --json
"""
# name, type, default, help: all of them settings that /set changes, too
SAMPLING = (
    ("temperature", float, 0.8, "divides the logits; 0 is greedy"),
    ("top_k", int, 0, "draw from so many tokens only; 0 is all"),
    ("top_p", float, 0.95, "draw from this much probability"),
    ("min_p", float, 0.0, "leave out tokens that are less likely than so much of the likeliest"),
    ("typical_p", float, 1.0, "draw from so much probability of typical tokens"),
    ("repetition_penalty", float, 1.1, "divides the logits of tokens that were there; 1 is none"),
    ("frequency_penalty", float, 0.0, "subtracted for each time that a token came"),
    ("presence_penalty", float, 0.0, "subtracted once a token came"),
    ("no_repeat_ngram_size", int, 0, "no sequence of so many tokens comes twice; 0 is off"),
    ("seed", int | None, None, "makes the answers repeatable"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """Declare the model, the conversation, the sampling rules and the engine."""
    from mtnlg.cli.engine_options import add_engine_arguments
    from mtnlg.cli.models import add_adapter_argument
    from mtnlg.cli.ranks import add_rank_arguments

    add = parser.add_argument
    add("model", metavar="MODEL", help=MODEL_HELP)
    add("--system", type=str | None, default=None, help="what the model is told first")
    add("--persona", type=str | None, default=None, help="a persona's name or file: write a transcript")
    add("--chat-template", type=str | None, default=None, help="jinja2 file, or name of a template")
    add("--policy", type=str, default="drop", help="when the context is full: drop, summarise or refuse")
    add("--max-new-tokens", type=int, default=256, help="longest answer")
    add(
        "--stop", type=str, action="append", default=[], help="a string that ends an answer; may come again"
    )
    for name, kind, default, what in SAMPLING:
        add(f"--{name.replace('_', '-')}", type=kind, default=default, help=what)
    add("--load", type=str | None, default=None, help="go on with a conversation saved as JSON")
    add("--save", type=str | None, default=None, help="save the conversation there at the end")
    add("--history", type=bool, default=True, help="remember what was typed for the next time")
    add("--stats", action="store_true", help="tokens per second after each answer")
    add("--lines", action="store_true", help="in a pipe: each line is a message of its own")
    add("--json", action="store_true", help="in a pipe: one JSON object for each answer")
    add_adapter_argument(parser)
    add("--device", type=str | None, default=None, help="cpu or cuda; null is the best one")
    add_engine_arguments(parser)
    add_rank_arguments(parser)


def run(arguments: Namespace) -> int:
    """Talk until the person leaves, or answer what the pipe holds."""
    from mtnlg.cli.ahead import begin_kernels, loading

    begin_kernels(arguments)  # before anything imports torch
    from mtnlg.cli.chat_input import read_utf8
    from mtnlg.cli.chat_pipe import answer_pipe
    from mtnlg.cli.chat_screen import write_what_fits
    from mtnlg.cli.chat_session import ChatSession
    from mtnlg.cli.models import open_model
    from mtnlg.generation import Engine

    read_utf8()
    write_what_fits()
    is_terminal = sys.stdin is not None and sys.stdin.isatty() and not arguments.json
    config, options = _engine_config(arguments), _options(arguments)
    earlier = _earlier(arguments.load)
    if is_terminal:
        print(f"Opening {arguments.model} ...", file=sys.stderr, flush=True)
    with loading():
        model, tokenizer = open_model(arguments.model, arguments.device, arguments)
    with Engine(model, tokenizer.decode, config).start() as engine:
        dialogue = _dialogue(arguments, engine, tokenizer, options, earlier)
        if not is_terminal:
            return answer_pipe(dialogue, sys.stdin, arguments)
        from mtnlg.cli.chat_input import make_reader
        from mtnlg.cli.chat_screen import make_screen

        about = f"{_about(arguments.model, model)}, {dialogue.max_length} positions."
        session = ChatSession(dialogue, tokenizer, make_screen(), arguments.stats, about)
        _welcome(session)
        session.run(make_reader(session, arguments.history))
        if arguments.save:
            session.save(arguments.save)
    return 0


def _engine_config(arguments: Namespace) -> Any:
    from mtnlg.cli.engine_options import engine_config

    return engine_config(arguments)


def _options(arguments: Namespace) -> Any:
    from mtnlg.generation.dialogue import DialogueOptions
    from mtnlg.generation.sampling import SamplingRules

    rules = SamplingRules(**{name: getattr(arguments, name) for name, *_ in SAMPLING})
    return DialogueOptions(rules, arguments.max_new_tokens, arguments.policy, tuple(arguments.stop))


def _earlier(path: str | None) -> list[dict[str, Any]]:
    from mtnlg.cli.chat_files import read_conversation

    return [] if path is None else read_conversation(path)


def _dialogue(
    arguments: Namespace, engine: Any, tokenizer: Tokenizer, options: Any, earlier: list[dict[str, Any]]
) -> Dialogue:
    from mtnlg.cli.chat_files import read_template
    from mtnlg.generation.dialogue import Dialogue
    from mtnlg.generation.dialogue_format import choose_format

    form = choose_format(tokenizer, arguments.persona, read_template(arguments.chat_template))
    return Dialogue(engine, tokenizer, form, arguments.system, options, earlier)


def _about(name: str, model: MegatronLmModel) -> str:
    from mtnlg.cli.terminal import quantity

    return f"{name}: {quantity(model.num_parameters, 'parameters')}"


def _welcome(session: Any) -> None:
    session.screen.note(session.about)
    session.screen.note(session.dialogue.form.explanation)
    session.screen.note(
        "Enter sends, Alt+Enter begins a new line, Ctrl-C stops an answer, /help shows the commands, "
        "Ctrl-D leaves."
    )
