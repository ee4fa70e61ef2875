"""A conversation with a model: its messages, its window of context, its streamed answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mtnlg.config.errors import ConfigError
from mtnlg.generation.dialogue_format import DialogueFormat, PersonaFormat, Tools
from mtnlg.generation.dialogue_ids import DialogueIds
from mtnlg.generation.dialogue_window import POLICIES, DialogueWindow, Prompt
from mtnlg.generation.engine import Engine
from mtnlg.generation.messages import Messages, checked_messages
from mtnlg.generation.request import FinishReason, Generation, GenerationRequest, GenerationUsage
from mtnlg.generation.sampling import SamplingRules
from mtnlg.tokens import Tokenizer


@dataclass
class DialogueOptions:
    """How answers are generated.

    Args:
        rules: how tokens are drawn. With a seed, each answer has its own stream of it.
        max_new_tokens: longest answer.
        policy: when the conversation outgrows the model's positions: ``drop`` leaves out the oldest
            turns and keeps the system prompt, ``summarise`` puts a summary by the model in their place,
            ``refuse`` says so.
        stop: more strings that end an answer.
        tools: JSON schemas of functions that the template tells the model of.
        variables: anything else that the template reads.

    Raises:
        ConfigError: naming every value that is out of range.
    """

    rules: SamplingRules = field(default_factory=SamplingRules)
    max_new_tokens: int = 256
    policy: str = "drop"
    stop: tuple[str, ...] = ()
    tools: Tools | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1.")
        if self.policy not in POLICIES:
            problems.append(f"policy is {self.policy!r}: choose one of {', '.join(POLICIES)}.")
        if problems:
            raise ConfigError(problems)


class Answer:
    """An answer while it comes: iterate for its pieces of text, to the end.

    Args:
        dialogue: which gets the finished message.
        prompt: what was asked.
        generation: the engine's work on it.
        beginning: what was there of it before; ``None`` of an answer that begins now.
    """

    def __init__(
        self, dialogue: Dialogue, prompt: Prompt, generation: Generation, beginning: str | None = None
    ) -> None:
        self._dialogue, self._prompt, self._generation = dialogue, prompt, generation
        self._beginning = beginning
        self._is_begun = bool(beginning)
        self.notices = list(prompt.notices)

    def __iter__(self) -> Iterator[str]:
        is_transcript = isinstance(self._dialogue.form, PersonaFormat)
        for event in self._generation:
            piece = event.text
            if is_transcript and not self._is_begun:
                piece = piece.lstrip()  # the space between the name and its line
            self._is_begun = self._is_begun or bool(piece)
            if piece:
                yield piece
        self._dialogue._finish(self)

    def cancel(self) -> None:
        """Stop; what has come stays the answer. The iteration ends with the next piece."""
        self._generation.cancel()

    def result(self) -> Answer:
        """Wait for the end."""
        for _piece in self:
            pass
        return self

    @property
    def text(self) -> str:
        """The message's content, as far as it has come."""
        return self._dialogue.form.content_of((self._beginning or "") + self._generation.text)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended."""
        return self._generation.finish_reason

    @property
    def usage(self) -> GenerationUsage:
        """What it took."""
        return self._generation.usage

    @property
    def prompt_ids(self) -> list[int]:
        """What the model was given."""
        return self._prompt.ids

    @property
    def new_ids(self) -> list[int]:
        """What it gave back."""
        return self._generation.new_ids


class Dialogue:
    """A conversation: ask, and iterate over the answer.

    Every message is kept; what the model sees is a window of them, see ``DialogueOptions.policy``. The
    ids of earlier turns stay the same from prompt to prompt, so that the engine's prefix cache holds
    their keys and values and only the new turn is read.

    Args:
        engine: generates.
        tokenizer: of its model.
        form: how the conversation is written, see ``choose_format``.
        system: what the model is told first.
        options: how answers are generated; may be replaced at any time.
        messages: an earlier conversation to go on with, in OpenAI's form.

    Raises:
        ConfigError: a message is wrong.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        form: DialogueFormat,
        system: str | None = None,
        options: DialogueOptions | None = None,
        messages: Messages = (),
    ) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self.form = self._chosen_form = form
        self.options = options or DialogueOptions()
        self.messages: list[dict[str, Any]] = []
        self.last_answer: Answer | None = None
        self._num_answers = 0
        self._window = self._new_window()
        if messages:
            self.load(messages)
        if system is not None:
            self.system = system

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._engine.max_length

    # -- answers

    def ask(self, text: str) -> Answer:
        """Send a message of the person's.

        Raises:
            ConfigError: it does not fit, or the template refuses it; the conversation is as before.
            QueueFullError: the engine has too much to do.
        """
        message = checked_messages([{"role": "user", "content": text}])
        return self._answer([*self.messages, *message])

    def answer(self) -> Answer:
        """Answer the last message, which is not the model's own.

        Raises:
            ConfigError: there is none, or as for :meth:`ask`.
        """
        if not self.messages or self.messages[-1]["role"] in ("assistant", "system"):
            raise ConfigError("there is no question to answer yet.")
        return self._answer(self.messages)

    def retry(self) -> Answer:
        """Another answer to the last question; with a seed, from another stream of it.

        Raises:
            ConfigError: nothing was asked yet.
        """
        messages = list(self.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] == "system":
            raise ConfigError("there is no answer to try again: ask something first.")
        return self._answer(messages)

    def go_on(self) -> Answer:
        """More of the last answer, which was cut off or stopped; the whole of it stays one message.

        Raises:
            ConfigError: the last message is no answer, there is no room left, or the model cannot
                (encoder-decoders begin every answer anew).
        """
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ConfigError("there is no answer to go on with: ask something first.")
        return self._answer(self.messages, is_open=True)

    def reword(self, text: str) -> Answer:
        """Ask the last question in other words; it and its answer go once the new words are accepted.

        Raises:
            ConfigError: nothing was asked yet, or as for :meth:`ask`.
        """
        message = checked_messages([{"role": "user", "content": text}])
        return self._answer([*self.messages[: self._last_question()], *message])

    @property
    def question(self) -> str:
        """The last question.

        Raises:
            ConfigError: nothing was asked yet.
        """
        return str(self.messages[self._last_question()]["content"])

    def undo(self) -> str:
        """Take back the last question and its answer; returns the question.

        Raises:
            ConfigError: nothing was asked yet.
        """
        text = self.question
        del self.messages[self._last_question() :]
        return text

    # -- messages

    @property
    def system(self) -> str | None:
        """What the model is told first."""
        first = self.messages[0] if self.messages else {"role": ""}
        return str(first["content"]) if first["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        if self.system is not None:
            del self.messages[0]
        if text:
            self.messages[:0] = checked_messages([{"role": "system", "content": text}])

    def clear(self) -> None:
        """Begin anew; the system prompt stays."""
        self.messages = self.messages[: 1 if self.system is not None else 0]
        self.form = self._chosen_form
        self._window = self._new_window()

    def load(self, messages: Messages) -> None:
        """Go on with another conversation.

        Raises:
            ConfigError: a message is wrong; the conversation is as before.
        """
        checked = checked_messages(messages)
        self.messages = checked
        self.clear_window()

    def use(self, form: DialogueFormat) -> None:
        """Write the conversation in another form from now on."""
        self._chosen_form = form
        self.clear_window()

    def clear_window(self) -> None:
        """Let the window begin with the first message again."""
        self.form = self._chosen_form
        self._window = self._new_window()

    # -- inside

    def _last_question(self) -> int:
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            raise ConfigError("there is no question yet: ask something first.")
        return asked[-1]

    def _new_window(self) -> DialogueWindow:
        ids = DialogueIds(self._tokenizer, self.form)
        return DialogueWindow(self.form, ids, self.max_length)

    def _answer(self, messages: list[dict[str, Any]], is_open: bool = False) -> Answer:
        if isinstance(self._chosen_form, PersonaFormat) and self.form is self._chosen_form:
            self.form = self._chosen_form.fixed(messages)
            self._window = self._new_window()
        options = self.options
        prompt = self._window.prompt(
            messages,
            options.max_new_tokens,
            options.policy,
            self._summarise,
            options.tools,
            options.variables,
            is_open,
        )
        rules = options.rules
        request = self._request(prompt.ids, rules, options.max_new_tokens)
        if rules.seed is not None:
            request = replace(request, stream=self._num_answers)
        generation = self._engine.submit(request)
        self._num_answers += 1
        self.messages = list(messages)
        beginning = str(messages[-1]["content"]) if is_open else None
        return Answer(self, prompt, generation, beginning)

    def _request(self, ids: list[int], rules: SamplingRules, max_new_tokens: int) -> GenerationRequest:
        return GenerationRequest(
            ids,
            rules,
            max_new_tokens=max_new_tokens,
            end_ids=self.form.end_ids,
            stop=(*self.form.stop, *self.options.stop),
        )

    def _summarise(self, ids: list[int], max_new_tokens: int) -> str:
        generation = self._engine.submit(self._request(ids, SamplingRules(), max_new_tokens))
        try:
            return self.form.content_of(generation.result().text).strip()
        finally:
            generation.cancel()  # does nothing unless the wait was broken off

    def _finish(self, answer: Answer) -> None:
        """File an answer that has come to its end."""
        self._window.ids.remember(answer._prompt.segments, answer.new_ids)
        if answer._beginning is not None:
            self.messages.pop()
        self.messages.append({"role": "assistant", "content": answer.text})
        self.last_answer = answer
