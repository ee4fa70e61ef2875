"""A rendered conversation as tokens, in which nothing that a person wrote becomes a special token.

A template writes ``<|user|>`` where a turn begins; so could a person, in the middle of a message, and take
over the conversation. Before rendering, special tokens in everything that comes from outside are put
between two marks, and any other place where one might begin gets a mark too, so that pieces from two
strings cannot meet and make one. After rendering, the unmarked names are the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mtnlg.config.errors import ConfigError
from mtnlg.tokens.chat_template import (
    BREAK,
    CLOSE,
    MARKS,
    OPEN,
    Message,
    render_chat,
    template_literals,
)

if TYPE_CHECKING:
    from mtnlg.tokens.tokenizer import Tokenizer

_CONTINUE = "\ufdd3"  # where the last message ends that the model is to go on with


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation.

    Args:
        text: what stands there.
        is_special: whether it is the name of a special token, written by the template.
    """

    text: str
    is_special: bool = False


class ChatPieces:
    """Renders one tokenizer's template and encodes the result.

    Args:
        tokenizer: whose special tokens count.
        template: jinja2 source.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[Piece]:
        """The conversation in pieces; text and special tokens take turns.

        Args:
            messages: with ``role`` and ``content``, oldest first.
            tools: JSON schemas of functions, in OpenAI's form.
            add_generation_prompt: end with the beginning of an answer.
            continue_final_message: leave the last message open, for the model to go on with.
            variables: anything else that the template reads.

        Raises:
            ConfigError: the template is broken or refuses these messages, or a message is no mapping.
        """
        shown = [self._message(number, message) for number, message in enumerate(messages)]
        if not shown:
            raise ConfigError("there are no messages: give at least one.")
        if continue_final_message:
            if add_generation_prompt:
                raise ConfigError("continue_final_message and add_generation_prompt exclude each other.")
            shown[-1]["content"] = _with_end(shown[-1].get("content"))
        outside = {"tools": None if tools is None else list(tools), "documents": None, **variables}
        text = render_chat(
            self._template,
            {
                **self._tokenizer.special_names,
                **{name: self._marked(value) for name, value in outside.items()},
                "messages": shown,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return self._cut(_until_end(text) if continue_final_message else text)

    def encode(self, pieces: Sequence[Piece], is_rest: bool = False) -> list[int]:
        """Token ids; as transformers gives for the whole text, where no message names a special token.

        A tokenizer that ends every text ends this one too.

        Args:
            pieces: as rendered.
            is_rest: something stands before them, so their first word does not begin the text.
        """
        ids = self._encode(pieces, is_rest)
        return [*ids, self._tokenizer.end_of_text_id] if self._tokenizer.ends_texts else ids

    def _encode(self, pieces: Sequence[Piece], is_rest: bool) -> list[int]:
        whole = "".join(piece.text for piece in pieces)
        specials = [piece for piece in pieces if piece.is_special]
        is_first = not (is_rest and self._begins_texts_differently)
        if is_first and len(self._names.findall(whole)) == len(specials):
            return self._plain(whole, allow_special=True)
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if piece.is_special:
                ids.append(self._tokenizer.special_tokens[piece.text])
            else:
                ids += self._encode_text(self._stripped(pieces, place), is_first=is_first and place == 0)
        return ids

    # -- marks

    def _message(self, number: int, message: Message) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise ConfigError(
                f"message {number} is a {type(message).__name__}: give a mapping with role and content."
            )
        # An absent key is what templates are written for; the OpenAI client sends null.
        return {
            key: self._marked(value, keep_keys=True) for key, value in message.items() if value is not None
        }

    def _marked(self, value: Any, keep_keys: bool = False) -> Any:
        """Everything in ``value`` with the names of special tokens marked."""
        if isinstance(value, str):
            for mark in (*MARKS, _CONTINUE):
                value = value.replace(mark, "")
            return self._outside.sub(_mark, value)
        if isinstance(value, Mapping):
            return {
                key if not isinstance(key, str) or key.isidentifier() else self._marked(key): self._marked(
                    item
                )
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self._marked(item) for item in value]
        return value

    @cached_property
    def _names(self) -> re.Pattern[str]:
        """Any special token's name, the longest first."""
        return re.compile(_any_of(self._tokenizer.special_tokens))

    @cached_property
    def _outside(self) -> re.Pattern[str]:
        """What to mark: a name, or a place where one could begin that the template does not look for."""
        names = list(self._tokenizer.special_tokens)
        first = {name[0] for name in names}
        looked_for = [
            literal
            for literal in template_literals(self._template)
            if literal[:1] in first
            and not any(letter in first for letter in literal[1:])
            and not any(name.startswith(literal) or literal.startswith(name) for name in names)
        ]
        return re.compile(
            f"(?P<name>{_any_of(names)})|(?P<known>{_any_of(looked_for)})|(?P<first>{_any_of(first)})"
        )

    @cached_property
    def _written(self) -> re.Pattern[str]:
        names = self._names.pattern
        return re.compile(f"{OPEN}(?P<outside>{names}){CLOSE}|(?P<own>{names})|[{''.join(MARKS)}]")

    def _cut(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        plain: list[str] = []
        end = 0
        for found in self._written.finditer(text):
            plain.append(text[end : found.start()])
            end = found.end()
            if found["own"]:
                pieces += [Piece("".join(plain)), Piece(found["own"], True)]
                plain = []
            elif found["outside"]:
                plain.append(found["outside"])
        pieces.append(Piece("".join([*plain, text[end:]])))
        return [piece for piece in pieces if piece.text]

    # -- ids

    def _stripped(self, pieces: Sequence[Piece], place: int) -> str:
        """A text piece without the spaces that the special tokens beside it swallow."""
        text, flags = pieces[place].text, self._tokenizer.special_flags
        if place and flags[pieces[place - 1].text].rstrip:
            text = text.lstrip()
        if place + 1 < len(pieces) and flags[pieces[place + 1].text].lstrip:
            text = text.rstrip()
        return text

    def _encode_text(self, text: str, is_first: bool) -> list[int]:
        if not text:
            return []
        if is_first or not self._begins_texts_differently:
            return self._plain(text)
        newline, ids = self._plain("\n"), self._plain("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._plain(text)

    def _plain(self, text: str, allow_special: bool = False) -> list[int]:
        """Without the token that ends a text, where the tokenizer puts one."""
        ids = self._tokenizer.encode(text, allow_special=allow_special)
        return ids[:-1] if self._tokenizer.ends_texts else ids

    @cached_property
    def _begins_texts_differently(self) -> bool:
        """Whether the first word of a text has other tokens than the same word after a special token."""
        name = next(iter(self._tokenizer.special_tokens), None)
        if name is None:
            return False
        return self._plain(f"{name}x", allow_special=True)[1:] != self._plain("x")


def _mark(found: re.Match[str]) -> str:
    if found["name"]:
        return f"{OPEN}{found['name']}{CLOSE}"
    return found["known"] or f"{found['first']}{BREAK}"


def _any_of(texts: Any) -> str:
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return "|".join(map(re.escape, ordered)) or "(?!)"  # what never matches


def _with_end(content: Any) -> Any:
    """The last message's content with a mark at its end, and a space that a template's trim takes away."""
    if isinstance(content, str):
        return content + _CONTINUE + " "
    if isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
        return [*content[:-1], {**content[-1], "text": content[-1]["text"] + _CONTINUE + " "}]
    raise ConfigError("the last message has no text to continue.")


def _until_end(text: str) -> str:
    before, mark, after = text.rpartition(_CONTINUE)
    if not mark:
        raise ConfigError("the chat template does not show the last message, so it cannot be continued.")
    return before if after.startswith(" ") else before.rstrip()
