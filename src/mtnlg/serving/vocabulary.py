"""Tokens as an API shows them: as text where they are text, as bytes where they are part of a character."""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import lru_cache

from mtnlg.tokens import Tokenizer

_Utf8 = getincrementaldecoder("utf-8")


def _bytes_of_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write for bytes (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(256 + i): value for i, value in enumerate(rest)}


class Vocabulary:
    """Names and bytes of a tokenizer's tokens.

    Args:
        tokenizer: whose.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {index: name for name, index in tokenizer.special_tokens.items()}
        self._letters = _bytes_of_letters() if _is_byte_level(tokenizer.definition) else None
        self.bytes_of = lru_cache(maxsize=2**17)(self._bytes_of)
        self.name_of = lru_cache(maxsize=2**17)(self._name_of)

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text; a special token's name."""
        if token in self._special:
            return self._special[token].encode()
        letters = self._tokenizer.core.id_to_token(token)
        if letters is None:
            return b""  # the model's vocabulary is larger than the tokenizer's
        if self._letters is not None and all(letter in self._letters for letter in letters):
            return bytes(self._letters[letter] for letter in letters)
        if len(letters) == 6 and letters.startswith("<0x") and letters.endswith(">"):
            return bytes([int(letters[3:5], 16)])
        return letters.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()

    def _name_of(self, token: int) -> str:
        """Its text; ``bytes:\\xe4\\xb8`` where the bytes are no text by themselves, as OpenAI writes it."""
        found = self.bytes_of(token)
        try:
            return found.decode() if found else f"<|id:{token}|>"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def offsets(self, tokens: Sequence[int], text_before: int = 0) -> list[int]:
        """Characters before each token in the text they make, special tokens left out.

        Args:
            tokens: in order.
            text_before: characters before the first.
        """
        decoder, found, length = _Utf8("replace"), [], text_before
        for token in tokens:
            content = b"" if token in self._special else self.bytes_of(token)
            is_cut = bool(decoder.getstate()[0] and content) and not 0x80 <= content[0] < 0xC0
            found.append(length + is_cut)  # half a character that is never finished is U+FFFD
            length += len(decoder.decode(content))
        return found


def _is_byte_level(definition: str) -> bool:
    decoder = json.loads(definition).get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)
