"""What a regular expression still asks for, so that masks that were made once are known again.

After some text an expression r asks for what its derivative by that text describes (Brzozowski, Derivatives
of Regular Expressions, 1964), and the mask of a vocabulary follows from it. Two texts with the same
derivative have the same mask. No token is longer than some number of characters, so that counts above it
do not matter either: line 3 of 200 asks for the same as line 4.

Only expressions of characters, classes, ``.``, groups, ``|`` and counts are read here. For others nothing
is remembered: llguidance, which knows them all, makes each mask.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from mtnlg.config.errors import MtnlgError

MOST_NODES = 4_000
MOST_BRANCHES = 64
MOST_COUNT = 10_000
LAST = 0x10FFFF
ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
PUNCTUATION = set("\\.+*?()|[]{}^$#&-~/")
Ranges = tuple[tuple[int, int], ...]
Node = tuple[Hashable, ...]
# Nodes by number: nothing, the empty text; others are ("one", ranges), ("then", a, b), ("or", a, b, ...)
# and ("times", a, least, most or -1).
NOTHING, EMPTY = 0, 1


class UnknownError(MtnlgError):
    """The expression has something that is not read here."""


class Residuals:
    """The derivatives of one expression.

    Args:
        expression: in Rust's syntax.
        most_characters: of a token.

    Raises:
        UnknownError: it has something that is not read here.
    """

    def __init__(self, expression: str, most_characters: int) -> None:
        self._most = max(most_characters, 1)
        self._nodes: list[Node] = [("nothing",), ("empty",)]
        self._numbers: dict[Node, int] = {node: i for i, node in enumerate(self._nodes)}
        self._shown: dict[int, int] = {}
        self._after: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()  # engines in several threads may share a rule
        self.whole = _Reader(self, expression).read()
        borders = {0}
        for node in self._nodes:
            if node[0] == "one":
                for first, last in node[1]:  # type: ignore[attr-defined]
                    borders |= {first, last + 1}
        self._borders = sorted(borders)

    # -- making nodes

    def number(self, *node: Hashable) -> int:
        """The number of a node; the same one for the same node."""
        found = self._numbers.get(node)
        if found is None:
            if len(self._nodes) >= MOST_NODES:
                raise UnknownError("the expression has too many derivatives.")
            found = self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return found

    def then(self, first: int, second: int) -> int:
        """One after the other."""
        if NOTHING in (first, second):
            return NOTHING
        if first == EMPTY:
            return second
        if second == EMPTY:
            return first
        node = self._nodes[first]
        if node[0] == "then":
            return self.then(_int(node[1]), self.then(_int(node[2]), second))
        return self.number("then", first, second)

    def either(self, *some: int) -> int:
        """One of several."""
        flat: set[int] = set()
        for one in some:
            node = self._nodes[one]
            flat |= {_int(part) for part in node[1:]} if node[0] == "or" else {one}
        flat.discard(NOTHING)
        if len(flat) < 2:
            return flat.pop() if flat else NOTHING
        if len(flat) > MOST_BRANCHES:
            raise UnknownError("the expression has too many branches at a time.")
        return self.number("or", *sorted(flat))

    def times(self, one: int, least: int, most: int) -> int:
        """Again and again; ``most`` -1 is without end."""
        if most == 0 or one == EMPTY:
            return EMPTY
        if one == NOTHING:
            return EMPTY if least == 0 else NOTHING
        return one if (least, most) == (1, 1) else self.number("times", one, least, most)

    # -- asking

    def may_end(self, number: int) -> bool:
        """Whether the empty text is of it."""
        kind, *parts = self._nodes[number]
        if kind == "then":
            return all(self.may_end(_int(part)) for part in parts)
        if kind == "or":
            return any(self.may_end(_int(part)) for part in parts)
        if kind == "times":
            return parts[1] == 0 or self.may_end(_int(parts[0]))
        return kind == "empty"

    def after(self, number: int, text: str) -> tuple[int, int] | None:
        """What is left of it after some characters, and what a token can see of that.

        Returns:
            ``None`` where that is not known.
        """
        with self._lock:
            try:
                for letter in text:
                    number = self._derivative(number, bisect_right(self._borders, ord(letter)) - 1)
                return None if number == NOTHING else (number, self._seen(number))
            except (UnknownError, RecursionError):
                return None

    def _derivative(self, number: int, place: int) -> int:
        found = self._after.get((number, place))
        if found is None:
            found = self._after[number, place] = self._derive(number, place)
            if len(self._after) > 4 * MOST_NODES:
                raise UnknownError("the expression has too many derivatives.")
        return found

    def _derive(self, number: int, place: int) -> int:
        kind, *parts = self._nodes[number]
        if kind == "one":
            code = self._borders[place]
            return EMPTY if any(first <= code <= last for first, last in parts[0]) else NOTHING  # type: ignore[attr-defined]
        if kind == "then":
            first, second = _int(parts[0]), _int(parts[1])
            found = self.then(self._derivative(first, place), second)
            return self.either(found, self._derivative(second, place)) if self.may_end(first) else found
        if kind == "or":
            return self.either(*(self._derivative(_int(part), place) for part in parts))
        if kind == "times":
            one, least, most = (_int(part) for part in parts)
            rest = self.times(one, max(least - 1, 0), most - 1 if most > 0 else -1)
            return self.then(self._derivative(one, place), rest)
        return NOTHING

    def _seen(self, number: int) -> int:
        """The same number for what differs only further on than a token reaches."""
        found = self._shown.get(number)
        if found is None:
            found = self._shown[number] = self._show(number)
        return found

    def _show(self, number: int) -> int:
        kind, *parts = self._nodes[number]
        if kind == "then":
            first, second = self._seen(_int(parts[0])), _int(parts[1])
            node = self._nodes[first]
            if node[0] == "times" and node[2] == node[3] == self._most and not self.may_end(_int(node[1])):
                return first  # nothing behind so many can be seen
            return self.then(first, self._seen(second))
        if kind == "or":
            return self.either(*(self._seen(_int(part)) for part in parts))
        if kind == "times":
            one, least, most = _int(parts[0]), _int(parts[1]), _int(parts[2])
            if least >= self._most and not self.may_end(one):
                least = most = self._most
            return self.times(self._seen(one), least, most)
        return number


def _int(value: Hashable) -> int:
    assert isinstance(value, int)
    return value


@dataclass(frozen=True)
class Residual:
    """How far a text has come.

    Args:
        residuals: of the expression.
        number: what it still asks for.
        seen: what a token can see of that.
        pending: bytes that begin a character.
    """

    residuals: Residuals
    number: int
    seen: int
    pending: bytes = b""

    @classmethod
    def of(cls, expression: str, most_characters: int) -> Residual | None:
        """Before any text; ``None`` where the expression has something that is not read here."""
        try:
            residuals = Residuals(expression, most_characters)
        except (UnknownError, RecursionError):
            return None
        found = residuals.after(residuals.whole, "")
        return None if found is None else cls(residuals, *found)

    @property
    def key(self) -> Hashable:
        """The same for texts that have the same mask."""
        return self.seen, self.pending

    def after(self, content: bytes) -> Residual | None:
        """After more bytes; ``None`` where that is not known."""
        content = self.pending + content
        whole = len(content)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            if error.end < whole:
                return None
            whole = error.start
            text = content[:whole].decode()
        found = self.residuals.after(self.number, text)
        return None if found is None else Residual(self.residuals, *found, content[whole:])


class _Reader:
    """Reads an expression, from left to right."""

    def __init__(self, residuals: Residuals, expression: str) -> None:
        self._residuals, self._text, self._place = residuals, expression, 0

    def read(self) -> int:
        found = self._either()
        if self._place < len(self._text):
            raise UnknownError("a parenthesis too many.")
        return found

    def _next(self, wanted: str) -> bool:
        found = self._text.startswith(wanted, self._place)
        self._place += len(wanted) * found
        return found

    def _letter(self) -> str:
        if self._place >= len(self._text):
            raise UnknownError("the expression ends early.")
        self._place += 1
        return self._text[self._place - 1]

    def _either(self) -> int:
        some = [self._then()]
        while self._next("|"):
            some.append(self._then())
        return self._residuals.either(*some)

    def _then(self) -> int:
        some = []
        while self._place < len(self._text) and self._text[self._place] not in "|)":
            some.append(self._counted(self._one()))
        found = EMPTY
        for one in reversed(some):
            found = self._residuals.then(one, found)
        return found

    def _one(self) -> int:
        letter = self._letter()
        if letter == "(":
            if self._next("?") and not self._next(":"):
                raise UnknownError("a group with settings.")
            found = self._either()
            if not self._next(")"):
                raise UnknownError("a parenthesis without an end.")
            return found
        if letter == "[":
            return self._residuals.number("one", self._class())
        if letter == ".":
            return self._residuals.number("one", _all_but(((10, 10),)))
        if letter in "^$*+?{}]":
            raise UnknownError(f"{letter} here.")
        code = ord(self._escaped() if letter == "\\" else letter)
        return self._residuals.number("one", ((code, code),))

    def _escaped(self) -> str:
        letter = self._letter()
        if letter not in ESCAPES and letter not in PUNCTUATION:
            raise UnknownError(f"\\{letter}.")
        return ESCAPES.get(letter, letter)

    def _class(self) -> Ranges:
        is_negated = self._next("^")
        found = tuple(sorted(self._ranges()))
        return _all_but(found) if is_negated else found

    def _ranges(self) -> Iterator[tuple[int, int]]:
        is_first = True
        while is_first or not self._next("]"):
            is_first = False
            first = self._of_class()
            last = first
            if self._next("-"):
                last = self._of_class()
            if last < first:
                raise UnknownError("a range from the end.")
            yield ord(first), ord(last)

    def _of_class(self) -> str:
        letter = self._letter()
        if letter in "[]-&~^":  # sets within sets, and what could be one
            raise UnknownError(f"{letter} in a class.")
        return self._escaped() if letter == "\\" else letter

    def _counted(self, one: int) -> int:
        least, most = 1, 1
        if self._next("*"):
            least, most = 0, -1
        elif self._next("+"):
            least, most = 1, -1
        elif self._next("?"):
            least, most = 0, 1
        elif self._next("{"):
            least, most = self._count()
        else:
            return one
        if self._place < len(self._text) and self._text[self._place] in "*+?{":
            raise UnknownError("a count of a count.")
        return self._residuals.times(one, least, most)

    def _count(self) -> tuple[int, int]:
        end = self._text.find("}", self._place)
        first, comma, second = self._text[self._place : max(end, self._place)].partition(",")
        self._place = end + 1
        if not first.isdecimal() or (second and not second.isdecimal()):
            raise UnknownError("a count that is none.")
        least = int(first)
        most = int(second) if second else -1 if comma else least
        if max(least, most) > MOST_COUNT or -1 < most < least:
            raise UnknownError("a count that is too large.")
        return least, most


def _all_but(ranges: Ranges) -> Ranges:
    found, start = [], 0
    for first, last in sorted(ranges):
        if start < first:
            found.append((start, first - 1))
        start = max(start, last + 1)
    if start <= LAST:
        found.append((start, LAST))
    return tuple(found)
