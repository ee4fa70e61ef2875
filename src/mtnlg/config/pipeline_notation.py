"""Megatron's notation of a pipeline's stages, such as ``Et*3|(tt|)*29,m|L``.

``E`` is the embedding, ``t`` a Transformer layer, ``L`` the head and the loss; ``|`` ends a stage;
``x*n`` repeats a letter and ``(...)*n`` a group; commas and spaces mean nothing.
"""

from __future__ import annotations

EMBEDDING, LAYER, LOSS, PREDICTION = "E", "t", "L", "m"
_LETTERS = EMBEDDING + LAYER + LOSS + PREDICTION + "|"
_LONGEST = 100_000  # letters after all repetitions


def parse_stages(text: str) -> list[str]:
    """The letters of each stage: ``"E(t|)*2L"`` is ``["Et", "t", "L"]``.

    Raises:
        ValueError: the text is not in the notation; the message says where.
    """
    reader = _Reader(text)
    letters = reader.sequence(depth=0)
    return letters.split("|")


def notation_problem(text: str) -> str | None:
    """What is wrong with a layout string by itself; ``None`` if nothing is."""
    try:
        letters = "|".join(parse_stages(text))
    except ValueError as error:
        return f"layout.pipeline_layout is {text!r}: {error}."
    reason = None
    if PREDICTION in letters:
        reason = "multi-token prediction (m) is no part of this model; leave it out"
    elif letters.count(EMBEDDING) != 1 or letters[0] != EMBEDDING:
        reason = "it must have one E (embedding), at its beginning"
    elif letters.count(LOSS) != 1 or letters[-1] != LOSS:
        reason = "it must have one L (head and loss), at its end"
    return None if reason is None else f"layout.pipeline_layout is {text!r}: {reason}."


class _Reader:
    """Reads the notation from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def sequence(self, depth: int) -> str:
        """Letters and groups up to the end, or to the parenthesis that closes this group."""
        parts: list[str] = []
        length = 0
        if depth > 10:
            raise ValueError("it nests more than 10 parentheses")
        while (letter := self._next()) is not None:
            if letter == ")":
                if depth == 0:
                    raise ValueError(f"')' at character {self.position} closes nothing")
                return "".join(parts)
            if letter == "(":
                part = self.sequence(depth + 1)
            elif letter in _LETTERS:
                part = letter
            else:
                raise ValueError(
                    f"{letter!r} at character {self.position} means nothing: use E (embedding), "
                    "t (layer), L (loss), | (next stage), x*n and (...)*n (repetition)"
                )
            parts.append(self._repeated(part))
            length += len(parts[-1])
            if length > _LONGEST:
                raise ValueError(f"it describes more than {_LONGEST} layers")
        if depth:
            raise ValueError("a '(' is not closed")
        return "".join(parts)

    def _next(self) -> str | None:
        while self.position < len(self.text):
            letter = self.text[self.position]
            self.position += 1
            if letter != "," and not letter.isspace():
                return letter
        return None

    def _repeated(self, part: str) -> str:
        """``part``, as often as a ``*n`` that follows says."""
        before = self.position
        if self._next() != "*":
            self.position = before
            return part
        digits = ""
        while self.position < len(self.text) and self.text[self.position] in "0123456789":
            digits += self.text[self.position]
            self.position += 1
        if not digits:
            raise ValueError(f"'*' at character {self.position} needs a number after it")
        if len(digits) > 6 or len(part) * int(digits) > _LONGEST:
            raise ValueError(f"it describes more than {_LONGEST} layers")
        return part * int(digits)
