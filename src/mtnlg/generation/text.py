"""Token ids to text piece by piece, never splitting a character."""

from __future__ import annotations

from collections.abc import Callable

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class IncrementalDecoder:
    """Turns a growing sequence of ids into pieces of text that add up to its decoding.

    A Chinese character or an emoji may span several tokens, and decoding half of one gives a
    replacement character. At most one of those can still turn into something else: a UTF-8
    sequence that is cut short decodes to exactly one, at the end. So that last one is held back.

    Args:
        decode: ids to text, e.g. ``tokenizer.decode``.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # the last complete piece: some tokenizers need a neighbour
        self._pending: list[int] = []  # since then
        self._context_length = 0  # characters of the decoded context
        self._num_sent = 0  # characters of the pending text already handed out

    def push(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._pending.append(token)
        text = self._pending_text()
        is_complete = not text.endswith(REPLACEMENT)
        stable = text if is_complete else text[:-1]
        piece = stable[self._num_sent :]
        self._num_sent = len(stable)
        if is_complete:
            self._start_anew()
        return piece

    def flush(self) -> str:
        """What was held back, as it stands (a broken character stays a replacement character)."""
        piece = self._pending_text()[self._num_sent :]
        self._start_anew()
        return piece

    def _pending_text(self) -> str:
        return self._decode(self._context + self._pending)[self._context_length :]

    def _start_anew(self) -> None:
        if self._pending:
            self._context, self._pending = self._pending, []
            self._context_length = len(self._decode(self._context))
        self._num_sent = 0
