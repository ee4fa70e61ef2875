"""Cutting a long text where the tokenizer would cut it anyway, so that it can be encoded in parts.

Two places are cuts in our split pattern and in those of GPT-2, GPT-4, Llama 3 and Qwen, whatever stands
further left or right: after a single line break between two visible characters, and before a single space
between two letters. In our own pattern Chinese punctuation before a Han character is a third.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Each match is one character wide; the cut is after a line break or sign and before a space.
_PLACES = re.compile(r"(?<=\S)\n(?=\S)|(?<=[^\W\d_]) (?=[^\W\d_])")
_PLACES_OWN = re.compile(
    r"(?<=\S)\n(?=\S)|(?<=[^\W\d_]) (?=[^\W\d_])|[，。！？；：、」』”）](?=[一-鿿㐀-䶿])"
)


def cut(text: str, characters: int, own_pattern: bool = True) -> Iterator[str]:
    """``text`` in parts of about ``characters``, cut only where the tokens do not change.

    A stretch without such a place stays whole, however long it is.

    Args:
        text: what to cut.
        characters: the least length of a part, but for the last.
        own_pattern: the tokenizer uses our split pattern, which allows more places.
    """
    if len(text) <= characters:
        if text:
            yield text
        return
    places = _PLACES_OWN if own_pattern else _PLACES
    start = 0
    while len(text) - start > characters:
        match = places.search(text, start + characters)
        if match is None:
            break
        end = match.start() if match.group() == " " else match.end()
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


class Cutter:
    """Cuts a text that arrives in blocks; what follows the last safe place waits for the next block.

    Args:
        own_pattern: the tokenizer uses our split pattern.
        cuttable: ``False`` keeps every text whole, for tokenizers whose pieces are not known.
    """

    def __init__(self, own_pattern: bool = True, cuttable: bool = True) -> None:
        self._places = _PLACES_OWN if own_pattern else _PLACES
        self._cuttable = cuttable
        self._held: list[str] = []

    def feed(self, block: str) -> str:
        """The text that is ready to be encoded; may be empty."""
        end = self._last_place(block) if self._cuttable else 0
        if not end:
            self._held.append(block)
            return ""
        ready = "".join([*self._held, block[:end]])
        self._held = [block[end:]]
        return ready

    def rest(self) -> str:
        """What waits, once the text is over."""
        ready = "".join(self._held)
        self._held = []
        return ready

    def _last_place(self, block: str) -> int:
        window = 1024
        while True:
            start = max(len(block) - window, 0)
            ends = [m.start() if m.group() == " " else m.end() for m in self._places.finditer(block, start)]
            if ends or not start:
                return ends[-1] if ends else 0
            window *= 8
