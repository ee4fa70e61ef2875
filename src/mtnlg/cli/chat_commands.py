"""The commands of ``mtnlg chat``: what each is called, what it says of itself, what it does."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtnlg.config.errors import ConfigError

if TYPE_CHECKING:
    from mtnlg.cli.chat_session import ChatSession

Run = Callable[["ChatSession", str], None]
Complete = Callable[["ChatSession", str], "list[str] | None"]


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        usage: what may follow its name.
        help: what it does.
        run: does it, with the text that followed.
        complete: what may come next; ``None`` for a file.
    """

    usage: str
    help: str
    run: Run
    complete: Complete = lambda _session, _rest: []


def _help(session: ChatSession, rest: str) -> None:
    wanted = rest.removeprefix("/").lower()
    names = [ALIASES.get(wanted, wanted)] if rest else list(COMMANDS)
    if rest and names[0] not in COMMANDS:
        raise ConfigError(f"there is no command /{names[0]}: /help shows them.")
    session.screen.table(
        [(f"/{name} {COMMANDS[name].usage}".rstrip(), COMMANDS[name].help) for name in names]
    )
    if not rest:
        session.screen.note(
            "Enter sends; Alt+Enter, or Enter after a backslash, begins a new line; "
            "Tab completes; Ctrl-C stops an answer; Ctrl-D leaves."
        )


def _set(session: ChatSession, rest: str) -> None:
    """``/set``, ``/set temperature`` or ``/set temperature 0.7``."""
    name, _, text = rest.replace("=", " ", 1).partition(" ")
    name = name.replace("-", "_")
    values = settings_of(session)
    if not name:
        session.screen.table([(key, _shown(value)) for key, value in values.items()])
        return
    if name not in values:
        near = [key for key in values if key.startswith(name)] or difflib.get_close_matches(name, values)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(values)}."
        raise ConfigError(f"there is no setting {name!r}: {hint}")
    if text.strip():
        _change(session, name, _parsed(name, text.strip(), values[name]))
    session.screen.note(f"{name} is {_shown(settings_of(session)[name])}")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(repr, value)) or "none"
    return str(value)


def settings_of(session: ChatSession) -> dict[str, Any]:
    """Every setting that ``/set`` changes."""
    options = session.dialogue.options
    rules = {
        item.name: getattr(options.rules, item.name)
        for item in dataclasses.fields(options.rules)
        if item.name != "logit_bias"
    }
    stats = "on" if session.shows_stats else "off"
    own = {"max_new_tokens": options.max_new_tokens, "stop": options.stop, "policy": options.policy}
    return {**rules, **own, "stats": stats}


def _parsed(name: str, text: str, now: Any) -> Any:
    if isinstance(now, str):
        return text
    if isinstance(now, tuple):  # the stop strings
        return () if text.lower() == "none" else (text.replace("\\n", "\n"),)
    if name == "seed" and text.lower() in ("none", "null", "off"):
        return None
    kind = float if isinstance(now, float) else int
    try:
        return kind(text)
    except ValueError:
        wanted = "a number" if kind is float else "a whole number"
        raise ConfigError(f"{name} is {text!r}: expected {wanted}.") from None


def _change(session: ChatSession, name: str, value: Any) -> None:
    options = session.dialogue.options
    if name == "stats":
        if value not in ("on", "off"):
            raise ConfigError(f"stats is {value!r}: choose on or off.")
        session.shows_stats = value == "on"
    elif name in ("max_new_tokens", "policy", "stop"):
        session.dialogue.options = dataclasses.replace(options, **{name: value})
    else:
        rules = dataclasses.replace(options.rules, **{name: value})
        session.dialogue.options = dataclasses.replace(options, rules=rules)


def _complete_set(session: ChatSession, rest: str) -> list[str]:
    name, space, _ = rest.partition(" ")
    if not space:
        return list(settings_of(session))
    values = {"policy": ["drop", "summarise", "refuse"], "stats": ["on", "off"]}
    return {**values, "seed": ["none"], "stop": ["none"]}.get(name, [])


def _system(session: ChatSession, rest: str) -> None:
    if rest:
        session.dialogue.system = None if rest == "-" else rest
        session.dialogue.clear_window()
    session.screen.note(f"system: {session.dialogue.system or '(nothing)'}")


def _persona(session: ChatSession, rest: str) -> None:
    from mtnlg.generation.dialogue_format import choose_format
    from mtnlg.generation.personas import PERSONAS

    if not rest:
        session.screen.note(session.dialogue.form.explanation)
        session.screen.table([(name, persona.description) for name, persona in PERSONAS.items()])
        return
    session.dialogue.use(choose_format(session.tokenizer, None if rest == "-" else rest))
    session.screen.note(session.dialogue.form.explanation)


def _complete_persona(_session: ChatSession, _rest: str) -> list[str]:
    from mtnlg.generation.personas import PERSONAS

    return list(PERSONAS)


def _retry(session: ChatSession, _rest: str) -> None:
    session.show(session.dialogue.retry)


def _continue(session: ChatSession, _rest: str) -> None:
    session.show(session.dialogue.go_on, is_rest=True)


def _undo(session: ChatSession, _rest: str) -> None:
    session.screen.note(f"taken back: {session.dialogue.undo()}")


def _edit(session: ChatSession, rest: str) -> None:
    """Another wording of the last question: given here, or edited in the next line."""
    if rest:
        session.show(lambda: session.dialogue.reword(rest))
    elif session.can_edit:
        session.draft = session.dialogue.question
    else:
        raise ConfigError("this terminal cannot show the question again: write /edit and the new wording.")


def _read(session: ChatSession, rest: str) -> None:
    """A file's text goes before the next message."""
    from mtnlg.cli.chat_files import read_text

    if not rest:
        raise ConfigError("name a text file: /read notes.txt")
    text = read_text(rest)
    session.texts_before.append(text.rstrip())
    num_tokens = len(session.tokenizer.encode(text))
    session.screen.note(f"{rest}: {num_tokens} tokens that go before your next message.")


def _save(session: ChatSession, rest: str) -> None:
    session.save(rest or "conversation.json")


def _load(session: ChatSession, rest: str) -> None:
    from mtnlg.cli.chat_files import read_conversation

    if not rest:
        raise ConfigError("name the file of a saved conversation: /load conversation.json")
    session.dialogue.load(read_conversation(rest))
    _show(session, "")


def _show(session: ChatSession, _rest: str) -> None:
    for message in session.dialogue.messages:
        session.screen.message(session.name_of(message["role"]), str(message["content"]))


def _info(session: ChatSession, _rest: str) -> None:
    dialogue = session.dialogue
    session.screen.note(session.about)
    session.screen.note(dialogue.form.explanation)
    session.screen.note(f"system: {dialogue.system or '(nothing)'}; {len(dialogue.messages)} messages.")


def _clear(session: ChatSession, _rest: str) -> None:
    session.dialogue.clear()
    session.texts_before.clear()
    session.screen.note("a new conversation begins.")


def _stats(session: ChatSession, _rest: str) -> None:
    session.screen.note(session.stats())


def _quit(session: ChatSession, _rest: str) -> None:
    session.is_over = True


def _file(_session: ChatSession, _rest: str) -> None:
    return None


COMMANDS: dict[str, Command] = {
    "help": Command("[command]", "show the commands", _help, lambda _s, _r: list(COMMANDS)),
    "set": Command("[name [value]]", "show or change a setting: /set temperature 0.7", _set, _complete_set),
    "system": Command("[text]", "show or change what the model is told first; - takes it away", _system),
    "persona": Command(
        "[name|file]", "show the personas, or speak with one; - leaves it", _persona, _complete_persona
    ),
    "continue": Command("", "let the last answer go on, where it was cut off or stopped", _continue),
    "retry": Command("", "another answer to the last question", _retry),
    "undo": Command("", "take the last question and its answer back", _undo),
    "edit": Command("[text]", "word the last question anew", _edit),
    "read": Command("file", "put the text of a file before your next message", _read, _file),
    "show": Command("", "the conversation so far", _show),
    "save": Command("[file]", "save the conversation as JSON (conversation.json)", _save, _file),
    "load": Command("file", "go on with a saved conversation", _load, _file),
    "clear": Command("", "begin a new conversation; the system prompt stays", _clear),
    "stats": Command("", "how fast the last answer came", _stats),
    "info": Command("", "which model this is, and how the conversation is written for it", _info),
    "quit": Command("", "leave, as do /exit and /bye", _quit),
}
# as other programs call them
ALIASES = {"?": "help", "exit": "quit", "bye": "quit", "q": "quit", "regen": "retry", "goon": "continue"}
