"""A conversation as token ids, with a mark at each that is learnt.

The chat template says how turns are written; it does not say which tokens are the assistant's. Those are
what the conversation up to an answer has more than the prompt of that answer, which is the text that the
model is given when it is asked. So exactly what generation would produce is learnt: the answer and the
token that ends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtnlg.config import ConfigError, DataError
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.chat_pieces import ChatPieces, Piece
from mtnlg.tuning.conversations import Conversation, exchanges


@dataclass(frozen=True)
class Example:
    """Something to learn.

    Args:
        ids: token ids.
        scored: of each id, whether predicting it counts.
    """

    ids: list[int]
    scored: list[bool]

    @property
    def num_scored(self) -> int:
        """Tokens whose prediction counts; the first of a text is never predicted."""
        return sum(self.scored[1:])


class Renderer:
    """Turns conversations into examples.

    Args:
        tokenizer: with the chat template that the tuned model will be asked with.
        loss_on: ``assistant``, ``last`` or ``all``.
        max_tokens: of an example.
        too_long: ``cut``, ``leave_out`` or ``refuse``.
        around: literal text before and after the prompts of plain completions.

    Attributes:
        num_cut: conversations that lost turns or the end of an answer.
        num_left_out: conversations that gave no example.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        loss_on: str = "assistant",
        max_tokens: int = 1024,
        too_long: str = "cut",
        around: tuple[str, str] = ("", ""),
    ) -> None:
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.max_tokens, self.too_long = max_tokens, too_long
        self.around = around
        self.num_cut = self.num_left_out = 0
        self._writer: ChatPieces = tokenizer.chat_pieces()
        self._tool_writer = tokenizer.chat_pieces(for_tools=True)

    def examples(self, conversation: Conversation) -> list[Example]:
        """The one of :meth:`example`, or none."""
        found = self.example(conversation)
        return [] if found is None else [found]

    def example(self, conversation: Conversation) -> Example | None:
        """The example of a conversation; ``None`` where nothing of it fits or is scored.

        Raises:
            DataError: it is too long and that is to be refused, or the template does not take it.
        """
        example = self._whole(conversation)
        if len(example.ids) > self.max_tokens:
            if self.too_long == "refuse":
                raise DataError(
                    f"{conversation.where}: the conversation has {len(example.ids)} tokens, and a sample "
                    f"{self.max_tokens}. Raise data.sequence_length, or set tuning.too_long to cut or "
                    "leave_out."
                )
            example = self._cut(conversation, example)
            self.num_cut += bool(example.num_scored)
        if not example.num_scored:
            self.num_left_out += 1
            return None
        return example

    def _cut(self, conversation: Conversation, example: Example) -> Example:
        """As many exchanges as fit; of a single one that does not, its beginning."""
        if self.too_long == "leave_out":
            return Example([], [])
        messages = conversation.messages
        if not conversation.is_plain:
            head = [m for m in messages[:1] if m["role"] == "system"]
            parts = list(exchanges(messages[len(head) :]))
            while len(parts) > 1 and len(example.ids) > self.max_tokens:
                parts.pop()
                shorter = [*head, *(message for part in parts for message in part)]
                example = self._whole(Conversation(shorter, conversation.where, conversation.tools))
        return Example(example.ids[: self.max_tokens], example.scored[: self.max_tokens])

    def _whole(self, conversation: Conversation) -> Example:
        try:
            segments = self._plain(conversation) if conversation.is_plain else self._chat(conversation)
        except ConfigError as error:
            raise DataError(f"{conversation.where}: {error}") from error
        ids: list[int] = []
        scored: list[bool] = []
        for part, counts in segments:
            ids += part
            scored += [counts or self.loss_on == "all"] * len(part)
        return Example(ids, scored)

    def _plain(self, conversation: Conversation) -> list[tuple[list[int], bool]]:
        prompt, completion = (str(message["content"]) for message in conversation.messages)
        prompt = self.around[0] + prompt + self.around[1]
        encode = self.tokenizer.encode
        return [(encode(prompt), False), ([*encode(completion), self.tokenizer.end_of_text_id], True)]

    def _chat(self, conversation: Conversation) -> list[tuple[list[int], bool]]:
        """The template's text in segments that are scored or not, encoded one by one."""
        writer = self._tool_writer if conversation.tools else self._writer
        messages = conversation.messages
        pieces = writer.render(messages, conversation.tools)
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss_on == "last":
            answers = answers[-1:]
        segments: list[tuple[list[int], bool]] = []
        place = 0
        for number in answers:
            start, end = self._span(writer, pieces, conversation, number)
            segments.append((_encoded(writer, pieces, place, start), False))
            segments.append((_encoded(writer, pieces, start, end), True))
            place = end
        rest = _between(pieces, place, len(_text(pieces)))
        if segments and not _ends_specially(pieces, place):
            # Where only text ends an answer, the end of the text is what stops the last one.
            segments.append(([self.tokenizer.end_of_text_id], True))
        elif rest:
            segments.append((writer.encode(rest, is_rest=True), False))
        return segments

    def _span(
        self, writer: ChatPieces, pieces: Sequence[Piece], conversation: Conversation, number: int
    ) -> tuple[int, int]:
        """Where answer ``number`` begins and ends in the text of the whole conversation."""
        messages, tools = conversation.messages, conversation.tools
        whole = _text(pieces)
        prompt = _text(writer.render(messages[:number], tools, add_generation_prompt=True))
        is_last = number == len(messages) - 1
        until = list(pieces) if is_last else writer.render(messages[: number + 1], tools)
        text = _text(until)
        if not (text.startswith(prompt) and whole.startswith(text)):
            raise ConfigError(
                f"the chat template writes messages[{number}] in another way than the prompt before it or "
                "the turns after it expect, so its tokens cannot be told apart. Set tuning.loss_on to last "
                "or tuning.max_turns to 2, or give another template."
            )
        end = len(text)
        specials = _special_ends(until)
        if specials and specials[-1] > len(prompt) and not text[specials[-1] :].strip():
            end = specials[-1]  # the answer is over there; what the template adds is no part of it
        return len(prompt), end


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _special_ends(pieces: Sequence[Piece]) -> list[int]:
    ends, place = [], 0
    for piece in pieces:
        place += len(piece.text)
        if piece.is_special:
            ends.append(place)
    return ends


def _ends_specially(pieces: Sequence[Piece], place: int) -> bool:
    """Whether a special token ends at ``place``."""
    return place in _special_ends(pieces)


def _between(pieces: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """The pieces of a part of the text; special tokens are never cut."""
    found, place = [], 0
    for piece in pieces:
        first, last = max(start - place, 0), min(end - place, len(piece.text))
        if first < last:
            found.append(Piece(piece.text[first:last], piece.is_special))
        place += len(piece.text)
    return found


def _encoded(writer: ChatPieces, pieces: Sequence[Piece], start: int, end: int) -> list[int]:
    part = _between(pieces, start, end)
    return writer.encode(part, is_rest=start > 0) if part else []
