"""How a conversation is written for a model: by its chat template, or as a transcript with a persona."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.generation.messages import Messages, checked_messages
from mtnlg.generation.personas import PERSONAS, Persona, find_persona, persona_for
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.chat_pieces import Piece
from mtnlg.tokens.chat_template import READER_CHAT_TEMPLATE

Tools = Sequence[Mapping[str, Any]]
_PROBE, _NEXT = "PROBE", "NEXT"
_USUAL_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>")


class DialogueFormat(Protocol):
    """Turns messages into a prompt, and knows where an answer ends.

    ``explanation`` says to a person which format it is and why; ``end_ids`` and ``stop`` end an answer;
    ``can_use_tools`` says whether tools reach the model.
    """

    explanation: str
    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    can_use_tools: bool

    def examples(self, messages: Messages) -> list[dict[str, Any]]:
        """Turns that stand before the conversation, oldest first; they may be left out."""

    def pieces(
        self, messages: Messages, tools: Tools | None = None, is_open: bool = False, **variables: Any
    ) -> list[Piece]:
        """The prompt of the next answer, or with ``is_open`` of the rest of the last message."""

    def encode(self, pieces: Sequence[Piece], is_rest: bool = False) -> list[int]:
        """Its token ids; with ``is_rest`` of what comes after others."""

    def content_of(self, text: str) -> str:
        """The message's content in an answer as it was generated."""


class TemplateFormat:
    """The tokenizer's chat template, or another.

    Where the template has no place for a system prompt (it refuses or forgets one), the text goes before
    the first question.

    Args:
        tokenizer: of the model.
        template: jinja2 source or a template's name; ``None`` takes the tokenizer's.

    Raises:
        ConfigError: there is none, or it is broken.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self._plain = tokenizer.chat_pieces(template)
        self._for_tools = tokenizer.chat_pieces(template, for_tools=True)
        self._is_read = tokenizer.ends_texts
        whose = "the model's own chat template" if template is None else "the chat template given"
        self.explanation = f"Answers are asked for with {whose}."
        self._takes_system = self._is_read or self._shows_system()
        if not self._takes_system:
            self.explanation += " It has no place for a system prompt: that goes before the first question."
        self.end_ids, self.stop = self._ends(tokenizer)
        self.can_use_tools = not self._is_read

    def examples(self, messages: Messages) -> list[dict[str, Any]]:
        """None: a chat model knows how to answer."""
        return []

    def pieces(
        self, messages: Messages, tools: Tools | None = None, is_open: bool = False, **variables: Any
    ) -> list[Piece]:
        """See :class:`DialogueFormat`.

        Raises:
            ConfigError: ``is_open``, of an encoder-decoder.
        """
        if is_open and self._is_read:
            raise ConfigError(
                "an encoder-decoder begins every answer anew: the last message cannot be continued."
            )
        writer = self._for_tools if tools else self._plain
        shown = messages if self._takes_system else _with_system_in_question(messages)
        return writer.render(shown, tools or None, not is_open, continue_final_message=is_open, **variables)

    def encode(self, pieces: Sequence[Piece], is_rest: bool = False) -> list[int]:
        """See :class:`DialogueFormat`."""
        return self._plain.encode(pieces, is_rest)

    def content_of(self, text: str) -> str:
        """As it is."""
        return text

    def _shows_system(self) -> bool:
        """Whether a system prompt reaches the model, or nothing can be known of it."""
        question = {"role": "user", "content": "a"}
        try:
            pieces = self._plain.render([{"role": "system", "content": _PROBE}, question])
        except ConfigError as error:
            return "refuses" not in str(error) or not self._takes([question])
        return any(_PROBE in piece.text for piece in pieces)

    def _takes(self, messages: Messages) -> bool:
        try:
            self._plain.render(messages)
        except ConfigError:
            return False
        return True

    def _ends(self, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What the template writes after an answer: a special token, or only text."""
        ids, stop = dict.fromkeys(end_of_text_ids(tokenizer)), []
        if self._is_read:
            return tuple(ids), ()
        turns = [("user", "a"), ("assistant", _PROBE), ("user", _NEXT)]
        try:
            pieces = self._plain.render([{"role": role, "content": text} for role, text in turns])
        except ConfigError as error:
            if "refuses" not in str(error):
                raise
            pieces = []  # it wants other messages than these: what is usual must do
            ids |= {tokenizer.special_tokens[n]: None for n in _USUAL_ENDS if n in tokenizer.special_tokens}
        place = max((n for n, piece in enumerate(pieces) if _PROBE in piece.text), default=None)
        if place is not None:
            after = pieces[place].text.rpartition(_PROBE)[2]
            # The token that closes the answer, and any that would open a turn of the person's.
            end_of_turn = next((n for n, piece in enumerate(pieces) if _NEXT in piece.text), len(pieces))
            between = [piece.text for piece in pieces[place + 1 : end_of_turn] if piece.is_special]
            if between and not after.strip():
                ids |= dict.fromkeys(tokenizer.special_tokens[name] for name in between)
            elif end := after.partition(_NEXT)[0].rstrip():
                stop = [end]
        return tuple(ids), tuple(stop)


class PersonaFormat:
    """A transcript with names before the lines, for a model that was never trained to chat.

    Args:
        tokenizer: of the model.
        persona: who speaks; ``None`` takes the built-in assistant in the language of the conversation's
            first question.
        explanation: why this format was chosen.
    """

    def __init__(self, tokenizer: Tokenizer, persona: Persona | None = None, explanation: str = "") -> None:
        self._tokenizer, self._persona = tokenizer, persona
        self._writer = tokenizer.chat_pieces("{{ '' }}")
        self.explanation = explanation or "The conversation is written as a transcript, with a persona."
        self.end_ids = tuple(end_of_text_ids(tokenizer))
        speakers = [persona] if persona is not None else [PERSONAS["assistant"], PERSONAS["assistant-zh"]]
        labels = [f"{name}{one.colon}" for one in speakers for name in (one.user, one.name)]
        self.stop = tuple(f"\n{label}" for label in labels)
        self.can_use_tools = False

    def persona(self, messages: Messages) -> Persona:
        """Who speaks in this conversation."""
        if self._persona is not None:
            return self._persona
        return persona_for(next((str(m["content"]) for m in messages if m["role"] == "user"), ""))

    def fixed(self, messages: Messages) -> PersonaFormat:
        """The same with the persona that ``messages`` call for, whatever is dropped from them later."""
        return PersonaFormat(self._tokenizer, self.persona(messages), self.explanation)

    def examples(self, messages: Messages) -> list[dict[str, Any]]:
        """The persona's example turns."""
        return [dict(message) for message in self.persona(messages).messages]

    def pieces(
        self, messages: Messages, tools: Tools | None = None, is_open: bool = False, **variables: Any
    ) -> list[Piece]:
        """See :class:`DialogueFormat`; tools and variables are nothing to a transcript."""
        persona = self.persona(messages)
        system = "\n\n".join(str(m["content"]) for m in messages if m["role"] == "system")
        head = system or persona.description
        turns = [m for m in messages if m["role"] != "system"]
        lines = [f"{self._label(persona, turn)}{self._content(turn)}" for turn in turns]
        if not is_open:
            lines.append(f"{persona.name}{persona.colon}")
        text = (f"{head}\n\n" if head else "") + "\n".join(lines)
        start = self._tokenizer.special_names.get("bos_token")
        is_known = start in self._tokenizer.special_tokens
        return [*([Piece(str(start), True)] if is_known else []), Piece(text)]

    def encode(self, pieces: Sequence[Piece], is_rest: bool = False) -> list[int]:
        """See :class:`DialogueFormat`."""
        return self._writer.encode(pieces, is_rest)

    def content_of(self, text: str) -> str:
        """Without the spaces around it, which belong to the transcript."""
        return text.strip()

    def _label(self, persona: Persona, message: Mapping[str, Any]) -> str:
        name = persona.name if message["role"] == "assistant" else persona.user
        return f"{name}{persona.colon}{persona.space}"

    def _content(self, message: Mapping[str, Any]) -> str:
        """A message that looks like another line of the transcript is moved in by a space."""
        labels = "|".join(re.escape(stop[1:]) for stop in self.stop)
        return re.sub(rf"^(?={labels})", " ", str(message["content"]).strip(), flags=re.MULTILINE)


def choose_format(
    tokenizer: Tokenizer, persona: str | Persona | None = None, template: str | None = None
) -> TemplateFormat | PersonaFormat:
    """The format that fits the model: its chat template if it has one, else a transcript.

    Args:
        tokenizer: of the model.
        persona: a persona, its name or file; forces the transcript.
        template: jinja2 source or a template's name; forces this template.

    Raises:
        ConfigError: both are given, or one is not there or broken.
    """
    if persona is not None and template is not None:
        raise ConfigError("give a persona or a chat template, not both.")
    if template is not None and "{" not in template and template not in tokenizer.chat_templates:
        names = ", ".join(tokenizer.chat_templates) or "none"
        raise ConfigError(f"the tokenizer has no chat template named {template!r}; it has {names}.")
    if persona is not None:
        found = find_persona(persona) if isinstance(persona, str) else persona
        return PersonaFormat(
            tokenizer, found, f"Written as a transcript in which the model is {found.name}, as asked for."
        )
    if template is not None or tokenizer.chat_template is not None:
        return TemplateFormat(tokenizer, template)
    if tokenizer.ends_texts:
        form = TemplateFormat(tokenizer, READER_CHAT_TEMPLATE)
        form.explanation = (
            "This encoder-decoder has no chat template: it reads a question as it stands, and a longer "
            "conversation as lines with names."
        )
        return form
    return PersonaFormat(
        tokenizer,
        explanation="This model has no chat template, so it was probably never trained to chat: the "
        "conversation is written as a transcript that it continues (personas).",
    )


@dataclass(frozen=True)
class DialoguePrompt:
    """A conversation ready for the engine.

    Args:
        ids: the prompt.
        end_ids: tokens that end the answer.
        stop: strings that end the answer.
        format: what wrote it; its ``content_of`` cleans the answer.
    """

    ids: list[int]
    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    format: DialogueFormat


def dialogue_prompt(
    tokenizer: Tokenizer,
    messages: Messages,
    tools: Tools | None = None,
    *,
    form: DialogueFormat | None = None,
    max_tokens: int | None = None,
    is_open: bool = False,
    **variables: Any,
) -> DialoguePrompt:
    """The prompt for the answer that comes after ``messages``.

    Args:
        tokenizer: of the model.
        messages: in OpenAI's form.
        tools: JSON schemas of functions.
        form: how to write it; ``None`` chooses by the tokenizer (chat template, else a persona).
        max_tokens: leave out a persona's examples, the oldest first, where the prompt would be longer.
        is_open: the last message is the beginning of the answer.
        variables: anything else that the template reads.

    Raises:
        ConfigError: a message is wrong, the template refuses them, or tools are given to a model
            without a chat template.
    """
    form = form or _default_format(tokenizer)
    shown = checked_messages(messages)
    if tools and not form.can_use_tools:
        raise ConfigError("tools need a chat template, and this model has none.")
    if isinstance(form, PersonaFormat):
        form = form.fixed(shown)
    examples = form.examples(shown)
    while True:
        ids = form.encode(form.pieces(with_examples(shown, examples), tools, is_open, **variables))
        if not examples or max_tokens is None or len(ids) <= max_tokens:
            return DialoguePrompt(ids, form.end_ids, form.stop, form)
        examples = examples[2:]


def messages_to_ids(
    tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None, **options: Any
) -> list[int]:
    """The ids of :func:`dialogue_prompt`, which has the arguments and the errors."""
    return dialogue_prompt(tokenizer, messages, tools, **options).ids


def dialogue_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer: of the text, and of a turn in the tokenizer's chat template."""
    return _default_format(tokenizer).end_ids


def dialogue_stop(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Strings that end an answer, where it is not (only) a token that does."""
    return _default_format(tokenizer).stop


def end_of_text_ids(tokenizer: Tokenizer) -> list[int]:
    """The token that ends a document; none where the tokenizer has none."""
    try:
        return [tokenizer.end_of_text_id]
    except DataError:
        return []


def _with_system_in_question(messages: Messages) -> list[Mapping[str, Any]]:
    """The system prompt as the beginning of the first question."""
    system = [str(message["content"]) for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    first = next((n for n, message in enumerate(rest) if message["role"] == "user"), None)
    if not system or first is None:
        return list(messages)
    rest[first] = {**rest[first], "content": "\n\n".join([*system, str(rest[first]["content"])])}
    return rest


def with_examples(messages: Messages, examples: Messages) -> list[Mapping[str, Any]]:
    """``examples`` between the system prompt and the conversation."""
    head = [m for m in messages[:1] if m["role"] == "system"]
    return [*head, *examples, *messages[len(head) :]]


@lru_cache(maxsize=8)
def _default_format(tokenizer: Tokenizer) -> TemplateFormat | PersonaFormat:
    return choose_format(tokenizer)
