"""A tokenizer's vocabulary as pieces of verse: which letters each token holds, cut anywhere.

A token may hold several letters, part of one, or the end of one and the beginning of another. Here each
token becomes (bytes that finish a letter begun before, whole letters, bytes that begin a letter), and
the tokens that fit the same beginning are laid out as arrays, so that a whole vocabulary is checked in a
few vector operations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mtnlg.generation.constraints.verse.rhymes import alphabet
from mtnlg.tokens.encoders import byte_letters

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """What one token holds.

    Args:
        lead: bytes that finish a letter begun by the token before.
        letters: numbers of the whole letters.
        tail: bytes that begin a letter.
    """

    lead: bytes
    letters: tuple[int, ...]
    tail: bytes


@dataclass(frozen=True)
class TokenTable:
    """Tokens that may follow the same unfinished letter, those of most letters first.

    Args:
        tokens: int32 [rows], their ids.
        letters: int32 [rows, most letters], numbers of their letters, -1 after the last.
        counts: int32 [rows], letters of each.
        tails: int32 [rows], index into ``tail_numbers``; 0 is none.
        tail_numbers: of the different tails, as ``beginnings`` numbers them.
        num_lettered: rows that have a letter.
    """

    tokens: Ints
    letters: Ints
    counts: Ints
    tails: Ints
    tail_numbers: Ints
    num_lettered: int

    @classmethod
    def of(cls, pieces: list[tuple[int, tuple[int, ...], bytes]]) -> TokenTable:
        """Lay out (token, letters, tail)."""
        pieces = sorted(pieces, key=lambda piece: -len(piece[1]))
        width = max((len(letters) for _, letters, _ in pieces), default=0)
        table = np.full((len(pieces), width), -1, np.int32, order="F")
        for row, (_, letters, _) in enumerate(pieces):
            table[row, : len(letters)] = letters
        tail_bytes = (b"", *sorted({tail for _, _, tail in pieces if tail}))
        index = {tail: i for i, tail in enumerate(tail_bytes)}
        return cls(
            np.array([token for token, _, _ in pieces], np.int32),
            table,
            np.array([len(letters) for _, letters, _ in pieces], np.int32),
            np.array([index[tail] for _, _, tail in pieces], np.int32),
            np.array([beginnings().numbers.get(tail, 0) for tail in tail_bytes], np.int32),
            sum(bool(letters) for _, letters, _ in pieces),
        )


class VerseTokens:
    """The tokens that can be part of a poem.

    Args:
        definition: the content of a ``tokenizer.json``.
        vocab_size: tokens the model gives logits for.
    """

    def __init__(self, definition: str, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.pieces: dict[int, Piece] = {}
        for token, content in token_bytes(definition).items():
            piece = _piece(content) if token < vocab_size else None
            if piece is not None:
                self.pieces[token] = piece
        self._tables: dict[bytes, TokenTable] = {}
        whole = [(i, piece.letters, piece.tail) for i, piece in self.pieces.items() if not piece.lead]
        self._tables[b""] = TokenTable.of(whole)
        self._finishing = [(i, piece) for i, piece in self.pieces.items() if piece.lead]
        self.most_letters = self._tables[b""].letters.shape[1] + 1
        self.spellable = self._spellable()
        for tail in {piece.tail for piece in self.pieces.values()}:
            self.table(tail)  # some fifty microseconds each, which no step has to wait for

    def table(self, pending: bytes) -> TokenTable:
        """The tokens that may follow these bytes of an unfinished letter."""
        found = self._tables.get(pending)
        if found is None:
            found = self._tables[pending] = TokenTable.of(list(self._following(pending)))
        return found

    @staticmethod
    def letter_of(content: bytes) -> int:
        """The number of the letter with these bytes; -1 if it is none of the alphabet."""
        return alphabet().number.get(content.decode("utf-8", "replace"), -1)

    def _following(self, pending: bytes) -> Iterator[tuple[int, tuple[int, ...], bytes]]:
        wanted = letter_length(pending[0])
        for token, piece in self._finishing:
            content = pending + piece.lead
            if len(content) < wanted and not piece.letters and not piece.tail:
                yield token, (), content
            elif len(content) == wanted:
                letter = self.letter_of(content)
                if letter >= 0:
                    yield token, (letter, *piece.letters), piece.tail

    def _spellable(self) -> npt.NDArray[np.bool_]:
        """bool [letters]: which letters some sequence of tokens writes."""
        letters = alphabet().letters
        single = {piece.letters[0] for piece in self.pieces.values() if len(piece.letters) == 1}
        bytes_there = {piece.lead for piece in self.pieces.values() if not piece.letters and not piece.tail}
        bytes_there |= {
            piece.tail for piece in self.pieces.values() if not piece.letters and not piece.lead
        }
        found = np.zeros(len(letters), bool)
        for number, letter in enumerate(letters):
            content = letter.encode()
            is_spelt = all(content[i : i + 1] in bytes_there for i in range(len(content)))
            found[number] = number in single or is_spelt
        return found


@lru_cache(maxsize=4)
def verse_tokens(definition: str, vocab_size: int) -> VerseTokens:
    """The tokens of a tokenizer; made once for each."""
    return VerseTokens(definition, vocab_size)


def token_bytes(definition: str) -> dict[int, bytes]:
    """The bytes of every token but the special ones, by id."""
    content = json.loads(definition)
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    added = {entry["id"] for entry in content.get("added_tokens", ())}
    values = {letter: byte for byte, letter in enumerate(byte_letters())}
    is_byte_level = '"ByteLevel"' in json.dumps([content.get("decoder"), content.get("pre_tokenizer")])
    found = {}
    for name, token in vocabulary.items():
        if token in added:
            continue
        if is_byte_level:
            if all(letter in values for letter in name):
                found[token] = bytes(values[letter] for letter in name)
        elif len(name) == 6 and name.startswith("<0x"):
            found[token] = bytes([int(name[3:5], 16)])
        else:
            found[token] = name.replace("\u2581", " ").encode()
    return found


def letter_length(first: int) -> int:
    """Bytes of the letter that begins with this one in UTF-8; 0 for no beginning."""
    return 1 if first < 0x80 else 0 if first < 0xC2 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4


def _piece(content: bytes) -> Piece | None:
    """The token's letters; ``None`` if no poem has such a token."""
    place = 0
    while place < len(content) and 0x80 <= content[place] < 0xC0:
        place += 1
    lead = content[:place]
    letters: list[int] = []
    number = alphabet().number
    while place < len(content):
        length = letter_length(content[place])
        part = content[place : place + length]
        if len(part) < length:
            return Piece(lead, tuple(letters), part) if _could_begin(part) else None
        letter = number.get(part.decode("utf-8", "replace")) if length else None
        if letter is None:
            return None
        letters.append(letter)
        place += length
    return Piece(lead, tuple(letters), b"") if len(lead) < 4 and content else None


@dataclass(frozen=True)
class Beginnings:
    """The beginnings of letters that are no whole letters.

    Args:
        numbers: of each; none at all is 0.
        of_letters: int32 [3, letters]: the numbers of each letter's first byte, first two, first three;
            0 where it has no more bytes.
    """

    numbers: dict[bytes, int]
    of_letters: Ints

    def of(self, letters: Ints) -> npt.NDArray[np.bool_]:
        """bool [beginnings]: which of them begin one of these letters."""
        found = np.zeros(len(self.numbers), bool)
        found[self.of_letters[:, letters]] = True
        found[0] = False
        return found


@lru_cache(maxsize=1)
def beginnings() -> Beginnings:
    """Those of the alphabet."""
    numbers: dict[bytes, int] = {b"": 0}
    of_letters = np.zeros((3, len(alphabet().letters)), np.int32)
    for length in (1, 2, 3):
        for i, letter in enumerate(alphabet().letters):
            content = letter.encode()
            if len(content) > length:
                of_letters[length - 1, i] = numbers.setdefault(content[:length], len(numbers))
    return Beginnings(numbers, of_letters)


def _could_begin(part: bytes) -> bool:
    return part in beginnings().numbers
