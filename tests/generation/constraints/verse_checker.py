"""Whether a text is regulated verse, from the rules as a handbook gives them and the tables alone."""

import itertools
import re
from functools import lru_cache
from pathlib import Path

import mtnlg.generation.constraints.verse as verse

DATA = Path(verse.__file__).parent / "data"


@lru_cache
def readings(name):
    """Letter → {(tone, rhyme)}; tone P or Z."""
    found = {}
    for line in (DATA / f"{name}.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        key, letters = line.split()
        tone = "Z" if key[-1] == "仄" else "P"
        rhyme = key[0] if key[0] not in "平仄" else None
        for letter in letters:
            found.setdefault(letter, set()).add((tone, rhyme))
    return found


def tones(letter, book):
    return {tone for tone, _ in readings(book).get(letter, ())}


def split_lines(text):
    """The lines of a poem and what stands between them."""
    parts = re.split(r"([，；。？！]\n?|\n)", text)
    assert all(parts[1::2])
    return [part for part in parts[::2] if part], parts[1::2]


def is_good_line(letters, kind, book):
    """Whether some reading of the line is of this kind: its second and last tone, e.g. ``PZ``."""
    options = [tones(letter, book) or {"?"} for letter in letters]
    return any(_is_good(reading, kind) for reading in itertools.product(*options))


def _is_good(reading, kind):
    five = reading[-5:]
    if len(reading) == 7 and not (reading[1] != kind[0] and reading[1] in "PZ"):
        return False
    if kind == "PZ" and five == tuple("PPZPZ"):  # the rescued line
        return True
    if five[1] != kind[0] or five[4] != kind[1]:
        return False
    fourth = {"PZ": "Z", "ZP": "P", "ZZ": "P", "PP": "Z"}[kind]
    if five[3] != fourth:
        return False
    if kind in ("PZ", "ZP") and five[2] != {"PZ": "P", "ZP": "Z"}[kind]:  # three alike at the end
        return False
    # no lone level tone before the rhyme
    return kind != "PP" or "P" in (five[0], five[2])


def rhyme_sets(letters, book):
    return [{rhyme for tone, rhyme in readings(book).get(letter, ()) if tone == "P"} for letter in letters]


def share_a_rhyme(letters, book):
    return bool(set.intersection(*rhyme_sets(letters, book)) - {None}) and len(set(letters)) == len(letters)


def is_regulated(lines, book="pingshui"):
    """对 within each couplet, 粘 between them, one level rhyme, the first line's if it likes."""
    for second, first_rhymes in itertools.product("PZ", (False, True)):
        kinds = []
        for i in range(len(lines)):
            # second tones: x, not x | not x, x | x, not x | ...
            turned = (i + 1) // 2 % 2
            tone = second if not turned else "PZ"[second == "P"]
            ends = "P" if i % 2 or (i == 0 and first_rhymes) else "Z"
            kinds.append(tone + ends)
        rhyming = [line[-1] for i, line in enumerate(lines) if i % 2 or (i == 0 and first_rhymes)]
        fits = all(is_good_line(line, kind, book) for line, kind in zip(lines, kinds))
        if fits and share_a_rhyme(rhyming, book):
            return True
    return False
