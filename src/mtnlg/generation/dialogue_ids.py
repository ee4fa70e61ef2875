"""The ids of a conversation's prompts, so that the model need not read earlier turns again.

Encoding an answer's text does not always give the tokens that were generated. The engine's prefix cache
knows tokens, so each prompt takes over the ids of the one before and of its answer, as far as the text is
the same, and only encodes what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mtnlg.generation.dialogue_format import DialogueFormat
from mtnlg.generation.text import IncrementalDecoder
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.chat_pieces import Piece


@dataclass(frozen=True)
class Segment:
    """A part of a prompt with its tokens.

    Args:
        piece: what is written; a text may be one of several segments that make up one piece.
        ids: its tokens.
    """

    piece: Piece
    ids: list[int]


def ids_of(segments: Sequence[Segment]) -> list[int]:
    """All tokens."""
    return [token for segment in segments for token in segment.ids]


class DialogueIds:
    """Encodes the prompts of one conversation.

    Args:
        tokenizer: of the model.
        form: how the conversation is written.
    """

    def __init__(self, tokenizer: Tokenizer, form: DialogueFormat) -> None:
        self._tokenizer, self._form = tokenizer, form
        self._special = set(tokenizer.special_tokens.values())
        self._known: list[Segment] = []  # the last prompt and its answer

    def encode(self, pieces: Sequence[Piece]) -> list[Segment]:
        """A prompt with its tokens: those of the last prompt and its answer as far as they say the same."""
        rest = list(pieces)
        taken = []
        for segment in self._known:
            if not rest or not _begins_with(rest[0], segment.piece):
                break
            taken.append(segment)
            more = rest[0].text[len(segment.piece.text) :]
            rest[:1] = [Piece(more)] if more else []
        return [*taken, *self._encode_rest(rest, is_rest=bool(taken))]

    def remember(self, prompt: Sequence[Segment], new_ids: Sequence[int]) -> None:
        """File a prompt and the tokens that were generated after it."""
        if self._tokenizer.ends_texts:  # of an encoder-decoder: each prompt is read by itself, to its end
            return
        decoder = IncrementalDecoder(self._tokenizer.decode, ids_of(prompt))
        self._known = list(prompt)
        waiting: list[int] = []
        for token in new_ids:
            if token in self._special:
                return  # the text of the answer ends here, or leaves it out
            waiting.append(token)
            if text := decoder.push(token):
                self._known.append(Segment(Piece(text), waiting))
                waiting = []

    def _encode_rest(self, pieces: list[Piece], is_rest: bool) -> list[Segment]:
        """New segments; the special tokens among the ids say where each piece begins."""
        waiting = self._form.encode(pieces, is_rest) if pieces else []
        segments = []
        for piece in pieces:
            end = 1
            if not piece.is_special:
                end = next((n for n, token in enumerate(waiting) if token in self._special), len(waiting))
            segments.append(Segment(piece, waiting[:end]))
            waiting = waiting[end:]
        if waiting and segments:  # what ends the whole text
            segments[-1] = Segment(segments[-1].piece, segments[-1].ids + waiting)
        return segments


def _begins_with(piece: Piece, beginning: Piece) -> bool:
    if piece.is_special or beginning.is_special:
        return piece == beginning
    return piece.text.startswith(beginning.text)
