"""Token ids to text piece by piece, never splitting a character, up to a stop string."""

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


class TextStream:
    """The text of a generation while it grows: whole characters, ended by stop strings.

    Text that could still become a stop string is held back until it is certain, so a stop string may
    lie across any number of tokens and no part of it is ever given out.

    Args:
        decode: ids to text.
        prompt_ids: what came before; its text is not part of the stream.
        stop: strings that end the text. Of several that are there, the one that is whole first counts.
        include_stop: let the text end with the stop string.
        min_tokens: a stop string that is whole before so many tokens were pushed counts as text.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.is_stopped = False
        self._decoder = IncrementalDecoder(decode, prompt_ids)
        self._stop = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._num_free = min_tokens - 1  # tokens that cannot end the text
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain with ``token``; may be empty."""
        piece = self._decoder.push(token)
        if self._num_free > 0:
            self._num_free -= 1
            return piece
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self.is_stopped, self._held = True, ""
            return text[: end if self._include_stop else start]
        self._held = text[len(text) - self._num_uncertain(text) :]
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """What was held back and will not become a stop string any more; half a character is dropped."""
        held, self._held = self._held, ""
        return held

    def _num_uncertain(self, text: str) -> int:
        """Characters at the end of ``text`` that a stop string may begin with."""
        longest = min(len(text), max(len(stop) for stop in self._stop) - 1)
        for count in range(longest, 0, -1):
            if any(len(stop) > count and stop.startswith(text[-count:]) for stop in self._stop):
                return count
        return 0


def continuation_text(decode: Decode, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text of ``new_ids`` after ``prompt_ids``: all the pieces of an ``IncrementalDecoder``."""
    before = decode(list(prompt_ids)) if prompt_ids else ""
    text = decode([*prompt_ids, *new_ids])[len(before) :]
    return text.removesuffix(REPLACEMENT)
