"""Token ids to text piece by piece, never splitting a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Decode = Callable[[list[int]], str]


class IncrementalDecoder:
    """Turns a growing sequence of ids into pieces of text that add up to its decoding.

    A Chinese character or an emoji may span several tokens, and decoding half of one gives a
    replacement character. At most one of those can still turn into something else: a UTF-8
    sequence that is cut short decodes to exactly one, at the end. So that last one is held back,
    and if generation stops there it is never sent: half a character is nothing.

    Args:
        decode: ids to text, e.g. ``tokenizer.decode``.
        context: ids that came before (the prompt); some tokenizers write a word differently at the
            beginning of a text.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(context)  # the last complete piece, or the prompt
        self._pending: list[int] = []  # since then
        self._context_length = len(decode(self._context)) if context else 0  # characters
        self._num_sent = 0  # characters of the pending text already handed out

    def push(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)[self._context_length :]
        is_complete = not text.endswith(REPLACEMENT)
        stable = text if is_complete else text[:-1]
        piece = stable[self._num_sent :]
        self._num_sent = len(stable)
        if is_complete:
            self._start_anew()
        return piece

    def _start_anew(self) -> None:
        self._context, self._pending = self._pending, []
        self._context_length = len(self._decode(self._context))
        self._num_sent = 0


def continuation_text(decode: Decode, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text of ``new_ids`` after ``prompt_ids``: all the pieces of an ``IncrementalDecoder``."""
    before = decode(list(prompt_ids)) if prompt_ids else ""
    text = decode([*prompt_ids, *new_ids])[len(before) :]
    return text.removesuffix(REPLACEMENT)
