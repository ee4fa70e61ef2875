"""Token ids to text piece by piece: never splitting a character, ending before a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
Decode = Callable[[list[int]], str]

# A character has at most 4 bytes, so no token further back than 4 can still change the text of the next.
_MOST_PENDING = 8
_PROMPT_CONTEXT = 16  # tokens of the prompt that a decoder looks at


class IncrementalDecoder:
    """Turns a growing sequence of ids into pieces of text that add up to its decoding.

    A Chinese character or an emoji may span several tokens, and decoding half of one gives a
    replacement character. At most one of those can still turn into something else: a UTF-8
    sequence that is cut short decodes to exactly one, at the end. So that last one is held back,
    and if generation stops there it is never sent: half a character is nothing.

    Each token decodes a few of its neighbours and nothing else, however long the text has become.

    Args:
        decode: ids to text, e.g. ``tokenizer.decode``.
        context: ids that came before (the prompt); some tokenizers write a word differently at the
            beginning of a text.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = _end_of_prompt(decode, context)  # what came before the pending ones
        self._pending: list[int] = []  # whose text is not all handed out, or that open the next piece
        self._context_length = len(decode(self._context)) if self._context else 0  # characters
        self._num_sent = 0  # characters of the pending text already handed out

    def push(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._pending.append(token)
        text = self._decode(self._context + self._pending)[self._context_length :]
        is_complete = not text.endswith(REPLACEMENT)
        stable = text if is_complete else text[:-1]
        piece = stable[self._num_sent :]
        self._num_sent = len(stable)
        if is_complete and text:
            self._start_anew()
        elif len(self._pending) > _MOST_PENDING:
            self._forget_the_oldest(text)
        return piece

    def _start_anew(self) -> None:
        self._context, self._pending = self._pending, []
        self._context_length = len(self._decode(self._context))
        self._num_sent = 0

    def _forget_the_oldest(self, text: str) -> None:
        """Shorten what is pending, where ids without text, or bytes of no character, go on and on."""
        if not text:
            self._pending.clear()
            return
        unsent = text[self._num_sent :]
        for kept in range(1, _MOST_PENDING):
            context, pending = self._pending[-_MOST_PENDING:-kept], self._pending[-kept:]
            length = len(self._decode(context))
            if self._decode(context + pending)[length:] == unsent:
                self._context, self._pending = context, pending
                self._context_length, self._num_sent = length, 0
                return


class TextStream:
    """Turns tokens into text that is certain: whole characters, nothing from a stop string on.

    The text ends where the first stop string is complete, whatever tokens it came in; of several that
    end at the same character, the longest counts. An end of the text that may still become a stop
    string is held back until it is known.

    Args:
        decode: ids to text, e.g. ``tokenizer.decode``.
        prompt_ids: what came before; its text is not part of the stream.
        stop: stop strings.
        include_stop: let the text end with the stop string instead of before it.
        min_tokens: a stop string that is complete before so many tokens were pushed counts as text.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = IncrementalDecoder(decode, prompt_ids)
        self._stop = [string for string in dict.fromkeys(stop) if string]
        self._include_stop = include_stop
        self._num_free = max(min_tokens - 1, 0)  # tokens to come that cannot end the text
        self._held = ""  # shorter than the longest stop string
        self.stopped_by: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came; no more tokens are taken then."""
        return self.stopped_by is not None

    def push(self, token: int) -> str:
        """The text that is certain with ``token``; may be empty."""
        piece = self._decoder.push(token)
        may_stop, self._num_free = self._num_free == 0, max(self._num_free - 1, 0)
        if not self._stop or not piece:
            return piece
        text = self._held + piece
        if may_stop and (found := self._first_stop(text, len(self._held))) is not None:
            start, self.stopped_by = found
            self._held = ""
            return text[:start] + (self.stopped_by if self._include_stop else "")
        certain = len(text) - self._beginning_of_stop(text)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str, num_old: int) -> tuple[int, str] | None:
        """(start, string) of the stop string that is complete first, past the ``num_old`` characters."""
        found = []
        for string in self._stop:
            start = text.find(string, max(0, num_old - len(string) + 1))
            if start >= 0:
                found.append((start + len(string), start, string))
        if not found:
            return None
        _, start, string = min(found)
        return start, string

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with but does not fill."""
        return max(
            (
                length
                for string in self._stop
                for length in range(1, min(len(string), len(text) + 1))
                if text.endswith(string[:length])
            ),
            default=0,
        )


def continuation_text(decode: Decode, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text of ``new_ids`` after ``prompt_ids``: all the pieces of an ``IncrementalDecoder``."""
    before = decode(list(prompt_ids)) if prompt_ids else ""
    text = decode([*prompt_ids, *new_ids])[len(before) :]
    return text.removesuffix(REPLACEMENT)


def _end_of_prompt(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last few ids of a prompt: enough that what follows is written as after all of it."""
    end = list(prompt[-_PROMPT_CONTEXT:])
    # Ids without text (special tokens) would leave the next word at the beginning of a text.
    if len(end) < len(prompt) and not decode(end).strip(REPLACEMENT):
        return list(prompt)
    return end
