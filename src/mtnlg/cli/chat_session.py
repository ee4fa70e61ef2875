"""A chat: reads messages and commands, shows answers; knows nothing of how a terminal works."""

from __future__ import annotations

import difflib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from mtnlg.cli.chat_commands import ALIASES, COMMANDS
from mtnlg.cli.chat_input import keys_unseen
from mtnlg.cli.main import describe
from mtnlg.config.errors import ConfigError, MtnlgError

if TYPE_CHECKING:
    from mtnlg.cli.chat_input import Reader
    from mtnlg.cli.chat_screen import Screen
    from mtnlg.generation.dialogue import Answer, Dialogue
    from mtnlg.tokens import Tokenizer


class ChatSession:
    """One conversation with a person.

    Args:
        dialogue: the conversation.
        tokenizer: of the model.
        screen: where things are shown.
        shows_stats: tokens per second after each answer.
        about: which model it is.
    """

    def __init__(
        self,
        dialogue: Dialogue,
        tokenizer: Tokenizer,
        screen: Screen,
        shows_stats: bool = False,
        about: str = "",
    ) -> None:
        self.dialogue, self.tokenizer, self.screen = dialogue, tokenizer, screen
        self.shows_stats, self.about = shows_stats, about
        self.texts_before: list[str] = []  # files that go before the next message
        self.is_over = False
        self.can_edit = False  # whether a draft is shown to be edited
        self.draft = ""  # what the next line begins with, after /edit

    def run(self, reader: Reader) -> None:
        """Read and answer until the person leaves."""
        self.can_edit = reader.can_edit
        while not self.is_over:
            draft, self.draft = self.draft, ""
            try:
                text = reader.read(draft)
            except KeyboardInterrupt:
                self.screen.note("(nothing was changed)" if draft else "(Ctrl-D or /quit leaves)")
                continue
            except EOFError:
                return
            except ConfigError as error:
                self.screen.error(describe(error))
                continue
            self.handle(text, is_reworded=bool(draft))

    def handle(self, text: str, is_reworded: bool = False) -> None:
        """Do what a line asks for; what goes wrong is shown, and the chat goes on.

        Args:
            text: the line.
            is_reworded: it takes the place of the last question.
        """
        try:
            if text.startswith("/") and not text.startswith("//"):
                self._command(text)
            elif text.strip():
                said = "\n\n".join([*self.texts_before, text[1:] if text.startswith("//") else text])
                ask = self.dialogue.reword if is_reworded else self.dialogue.ask
                self.show(lambda: ask(said))
        except (MtnlgError, OSError) as error:
            self.screen.error(describe(error))
        except KeyboardInterrupt:
            self.screen.note("[stopped]")

    def show(self, ask: Callable[[], Answer], is_rest: bool = False) -> None:
        """Stream an answer, or the rest of one; Ctrl-C stops it and nothing else."""
        with _CtrlC() as ctrl_c, keys_unseen():
            answer = ask()
            self.texts_before.clear()
            ctrl_c.call(answer.cancel)
            for notice in answer.notices:
                self.screen.note(f"({notice})")
            self.screen.begin_answer(self.name_of("assistant") + ("… " if is_rest else ""))
            for piece in answer:
                self.screen.piece(piece)
            self.screen.end_answer(self._remark(answer))

    def save(self, path: str) -> None:
        """Write the conversation to a file."""
        from mtnlg.cli.chat_files import write_conversation

        file = write_conversation(path, self.dialogue.messages)
        self.screen.note(f"saved {len(self.dialogue.messages)} messages: {file}")

    def completions(self, text: str) -> list[str] | None:
        """What may come at the end of a command line; ``None`` where a file is wanted."""
        name, space, rest = text.partition(" ")
        if not space:
            return [f"/{name}" for name in COMMANDS]
        command = COMMANDS.get(name[1:])
        return [] if command is None else command.complete(self, rest)

    def stats(self) -> str:
        """How fast the last answer came."""
        if self.dialogue.last_answer is None:
            raise ConfigError("there is no answer yet.")
        return speed(self.dialogue.last_answer, self.dialogue.max_length)

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        name = ALIASES.get(name.lower(), name.lower())
        command = COMMANDS.get(name)
        if command is None:
            near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean /{near[0]}?" if near else "/help shows them."
            raise ConfigError(f"there is no command /{name}: {hint} (A message may begin with //.)")
        command.run(self, rest.strip())

    def name_of(self, role: str) -> str:
        """What stands before the lines of somebody: of the persona, where there is one."""
        from mtnlg.generation.dialogue_format import PersonaFormat

        form = self.dialogue.form
        if isinstance(form, PersonaFormat) and role in ("user", "assistant"):
            persona = form.persona(self.dialogue.messages)
            name = persona.name if role == "assistant" else persona.user
            return f"{name}{persona.colon}{persona.space}"
        return {"user": "You: ", "assistant": "Model: ", "system": "System: "}.get(role, f"{role}: ")

    def _remark(self, answer: Answer) -> str:
        remarks = {
            "cancelled": "stopped",
            "length": "cut off: /continue goes on, /set max_new_tokens allows more",
            "deadline": "out of time",
        }
        parts = [remarks.get(answer.finish_reason or "", "")]
        if self.shows_stats:
            parts.append(self.stats())
        return "; ".join(part for part in parts if part)


def speed(answer: Answer, max_length: int) -> str:
    """How fast an answer came, in one line."""
    usage = answer.usage
    seconds = usage.total_seconds - usage.first_token_seconds
    rate = f"{(usage.new_tokens - 1) / seconds:.1f}" if seconds > 0 and usage.new_tokens > 1 else "-"
    return (
        f"{usage.new_tokens} tokens, {rate} tokens/s, first after {usage.first_token_seconds:.2f} s; "
        f"prompt {usage.prompt_tokens} tokens ({usage.cached_tokens} remembered) of {max_length}"
    )


class _CtrlC:
    """While this lasts, Ctrl-C calls the given action; before there is one, it raises as ever."""

    def __init__(self) -> None:
        self._action: Callable[[], None] | None = None
        self._before: Any = None

    def call(self, action: Callable[[], None]) -> None:
        """From now on, call ``action``."""
        self._action = action

    def __enter__(self) -> _CtrlC:
        if threading.current_thread() is threading.main_thread():  # no other thread gets signals
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._action is None:
            raise KeyboardInterrupt
        self._action()
