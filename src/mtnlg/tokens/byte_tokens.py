"""Tokens like ``<0xE4>``: letters without a piece of their own, written as their UTF-8 bytes.

The library decodes a run of them whole or not at all: where the run is no valid UTF-8, every byte becomes a
U+FFFD, also those of characters that were complete. Streaming needs what UTF-8 decoders do: complete
characters stay, and a sequence that is cut short or wrong is one U+FFFD.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class ByteTokens:
    """Decodes what the library would not; false where the tokenizer has no such tokens.

    Args:
        core: the library's tokenizer.
    """

    def __init__(self, core: Any) -> None:
        has_any = core.decoder is not None and b"ByteFallback" in core.decoder.__getstate__()
        found = {core.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)} if has_any else {}
        self._byte_of: dict[int, int] = {token: byte for token, byte in found.items() if token is not None}
        self._anchor = core.token_to_id("<0x78>")  # an x, to stand before what does not begin the text
        added = core.get_added_tokens_decoder() if self._byte_of else {}
        self._special = {token for token, content in added.items() if content.special}

    def __bool__(self) -> bool:
        return bool(self._byte_of) and self._anchor is not None

    def decode(self, core: Any, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ``ids``, in which a run of bytes may be broken anywhere."""
        if skip_special_tokens:
            ids = [token for token in ids if token not in self._special]
        text = ""
        for number, chunk in enumerate(self._sound(ids)):
            text += REPLACEMENT if number else ""
            if chunk:
                anchor = [self._anchor] if number else []
                whole = core.decode([*anchor, *chunk], skip_special_tokens=skip_special_tokens)
                text += whole[len(anchor) :]
        return text

    def _sound(self, ids: Sequence[int]) -> Iterator[list[int]]:
        """Parts of ``ids`` whose bytes are whole characters; what is none stood between them."""
        part: list[int] = []
        at = 0
        while at < len(ids):
            if ids[at] not in self._byte_of:
                part.append(ids[at])
                at += 1
                continue
            end = at
            while end < len(ids) and ids[end] in self._byte_of:
                end += 1
            try:
                bytes(self._byte_of[token] for token in ids[at:end]).decode()
            except UnicodeDecodeError as error:
                part += ids[at : at + error.start]
                yield part
                part, at = [], at + error.end
            else:
                part += ids[at:end]
                at = end
        yield part
