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
