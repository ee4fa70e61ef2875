"""Which characters rhyme, and which are level (平) or oblique (仄).

A character may have several readings. It then counts as each of them, as in the books: 看 is level or
oblique as the line needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import numpy as np
import numpy.typing as npt

LEVEL, OBLIQUE = 1, 2  # bits of a character's tones
BOOKS = ("pingshui", "xinyun", "shisanzhe")
# The thirteen 辙 are the fourteen modern rhymes with 支 and 齐 as one.
_THIRTEEN = {"支": "齐"}
_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF))
COMMA, STOP, BREAK = 1, 2, 4  # what a mark may stand for: end of an odd line, of an even line, new line
MARKS = {
    "，": COMMA,
    "；": COMMA | STOP,
    "。": STOP,
    "？": COMMA | STOP,
    "！": COMMA | STOP,
    "\n": BREAK,
}


@dataclass(frozen=True)
class Alphabet:
    """The characters that a poem may be written with, numbered.

    Args:
        letters: every Han character of the books and of Unicode's two basic blocks, and the marks, in
            the order of their code points, which is that of their bytes.
        number: of each letter.
        marks: uint8 [letters], bits of what a mark may stand for; 0 for Han characters.
    """

    letters: str
    number: dict[str, int]
    marks: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RhymeBook:
    """Tones and rhymes of the letters of the alphabet.

    Args:
        names: of the rhymes, in the order of their bits.
        tones: uint8 [letters], bits ``LEVEL`` and ``OBLIQUE``; 0 where the book does not know it.
        level_rhymes: uint32 [letters], the rhymes of its level readings.
        rhymes: uint32 [letters], the rhymes of all its readings (the Pingshui's oblique rhymes, which
            regulated verse does not use, are left out).
    """

    names: tuple[str, ...]
    tones: npt.NDArray[np.uint8]
    level_rhymes: npt.NDArray[np.uint32]
    rhymes: npt.NDArray[np.uint32]


@lru_cache(maxsize=1)
def alphabet() -> Alphabet:
    """The letters that all books share."""
    known = {letter for name in ("pingshui", "modern") for _, text in _entries(name) for letter in text}
    known |= {chr(code) for first, last in _HAN for code in range(first, last + 1)}
    letters = "".join(sorted(known | set(MARKS)))
    marks = np.array([MARKS.get(letter, 0) for letter in letters], np.uint8)
    return Alphabet(letters, {letter: i for i, letter in enumerate(letters)}, marks)


@lru_cache(maxsize=len(BOOKS))
def rhyme_book(name: str) -> RhymeBook:
    """One of ``BOOKS``: 平水韵, 中华新韵 (fourteen rhymes) or 十三辙 (thirteen)."""
    letters = alphabet()
    tones = np.zeros(len(letters.letters), np.uint8)
    level_rhymes = np.zeros(len(letters.letters), np.uint32)
    rhymes = np.zeros(len(letters.letters), np.uint32)
    names: list[str] = []
    for key, text in _entries("pingshui" if name == "pingshui" else "modern"):
        places = [letters.number[letter] for letter in text]
        is_oblique = key.endswith("仄")
        tones[places] |= OBLIQUE if is_oblique else LEVEL
        rhyme = key.rstrip("平仄")  # nothing for the Pingshui's oblique readings and for young letters
        if name == "shisanzhe":
            rhyme = _THIRTEEN.get(rhyme, rhyme)
        if not rhyme:
            continue
        if rhyme not in names:
            names.append(rhyme)
        bit = np.uint32(1 << names.index(rhyme))
        rhymes[places] |= bit
        if not is_oblique:
            level_rhymes[places] |= bit
    return RhymeBook(tuple(names), tones, level_rhymes, rhymes)


def _entries(name: str) -> list[tuple[str, str]]:
    """(key, letters) of each line of a table."""
    text = (files(__package__) / "data" / f"{name}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [(key, letters) for key, _, letters in (line.partition(" ") for line in lines)]
