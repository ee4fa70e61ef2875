"""The forms of Chinese verse: line lengths, tone patterns, rhymes.

Regulated verse (近体诗) is built of four kinds of line, here for five characters (P level 平, Z oblique
仄, * either). Seven characters put two of the opposite tone before.

    A  P P P Z Z        B  Z Z Z P P
    C  Z Z P P Z        D  P P Z Z P

A quatrain is CDAB, BDAB, ABCD or DBCD; eight lines go on so that each couplet sticks to the last one
(粘). The second of the four begins oblique and rhymes from its first line on, and so on. Relaxed lines
follow 一三五不论: the first, third and fifth character are free, but for what would leave a line with a
lone level tone (孤平) or three alike at its end (三平尾, 三仄尾); PPZPZ for A and ZPPZP for D are the
usual rescues (拗救).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mtnlg.config.errors import ConfigError
from mtnlg.generation.constraints.verse.rhymes import BOOKS

TONES = ("relaxed", "strict", "free")
LAYOUTS = ("marked", "bare")
REGULATED = {"wujue": (5, 4), "qijue": (7, 4), "wulv": (5, 8), "qilv": (7, 8)}
_CHINESE_NAMES = {"五绝": "wujue", "七绝": "qijue", "五律": "wulv", "七律": "qilv"}
_LONG_NAMES = {"五言绝句": "wujue", "七言绝句": "qijue", "五言律诗": "wulv", "七言律诗": "qilv"}
_MOST_LINES, _MOST_CHARACTERS = 64, 32

_STRICT = {
    5: {"A": ("PPPZZ",), "B": ("ZZZPP",), "C": ("ZZPPZ",), "D": ("PPZZP",)},
    7: {"A": ("ZZPPPZZ",), "B": ("PPZZZPP",), "C": ("PPZZPPZ",), "D": ("ZZPPZZP",)},
}
_RELAXED = {
    5: {"A": ("*PPZZ", "PPZPZ"), "B": ("*ZZPP",), "C": ("*Z*PZ",), "D": ("PP*ZP", "*PPZP")},
    7: {
        "A": ("*Z*PPZZ", "*ZPPZPZ"),
        "B": ("*P*ZZPP",),
        "C": ("*P*Z*PZ",),
        "D": ("*ZPP*ZP", "*Z*PPZP"),
    },
}
# The kinds of line in order, and whether the first line rhymes.
_SCHEMES = {
    4: (("CDAB", False), ("BDAB", True), ("ABCD", False), ("DBCD", True)),
    8: (("CDABCDAB", False), ("BDABCDAB", True), ("ABCDABCD", False), ("DBCDABCD", True)),
}


@dataclass(frozen=True)
class VerseForm:
    """What a poem must be like.

    Args:
        lines: characters of each line.
        regulated: follow the tone patterns and rhymes of regulated verse (four or eight lines of five
            or seven characters).
        tones: ``relaxed`` (一三五不论), ``strict`` (the patterns to the letter) or ``free``.
        book: ``pingshui`` (平水韵), ``xinyun`` (中华新韵) or ``shisanzhe`` (十三辙).
        rhyme: numbers of the lines, from 1, that rhyme, where the form does not say.
        layout: ``marked`` (lines end with punctuation, and may each begin on a new line) or ``bare``
            (new lines and no punctuation).
        heads: the first character of each line (藏头诗); empty leaves them free.
        begin: the beginning of the poem, which the prompt has already.

    Raises:
        ConfigError: naming everything that is wrong.
    """

    lines: tuple[int, ...]
    regulated: bool = False
    tones: str = "relaxed"
    book: str = "pingshui"
    rhyme: tuple[int, ...] = ()
    layout: str = "marked"
    heads: str = ""
    begin: str = ""

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= len(self.lines) <= _MOST_LINES:
            problems.append(f"verse has {len(self.lines)} lines: 1 to {_MOST_LINES} can be.")
        if not all(isinstance(length, int) and 1 <= length <= _MOST_CHARACTERS for length in self.lines):
            problems.append(f"verse lines are {self.lines}: each has 1 to {_MOST_CHARACTERS} characters.")
        for name, choices in (("tones", TONES), ("book", BOOKS), ("layout", LAYOUTS)):
            if getattr(self, name) not in choices:
                problems.append(
                    f"verse {name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}."
                )
        if not all(isinstance(line, int) and 1 <= line <= len(self.lines) for line in self.rhyme):
            problems.append(f"verse rhyme is {self.rhyme}: the lines are 1 to {len(self.lines)}.")
        if self.regulated and (len(set(self.lines)) > 1 or (self.lines[0], len(self.lines)) not in _FITS):
            problems.append(f"verse lines are {self.lines}: regulated verse has 4 or 8 lines of 5 or 7.")
        if self.heads and len(self.heads) != len(self.lines):
            problems.append(f"verse heads is {self.heads!r}: it needs {len(self.lines)} characters.")
        if problems:
            raise ConfigError(problems)

    def schemes(self) -> list[Scheme]:
        """The ways to fulfil the form; a poem follows one of them from end to end."""
        if not self.regulated:
            rhyming = tuple(line + 1 in self.rhyme for line in range(len(self.lines)))
            return [Scheme(tuple(("*" * length,) for length in self.lines), rhyming)]
        length = self.lines[0]
        kinds = (_STRICT if self.tones == "strict" else _RELAXED)[length]
        if self.tones == "free":
            kinds = {kind: ("*" * (length - 1) + patterns[0][-1],) for kind, patterns in kinds.items()}
        found = []
        for order, first_rhymes in _SCHEMES[len(self.lines)]:
            rhyming = tuple(i % 2 == 1 or (i == 0 and first_rhymes) for i in range(len(order)))
            found.append(Scheme(tuple(kinds[kind] for kind in order), rhyming))
        return list(dict.fromkeys(found))

    @classmethod
    def from_value(cls, value: Any) -> VerseForm:
        """A form from what a user gave.

        Args:
            value: a ``VerseForm``; a dict of its fields, with ``form`` for the name; or a text: the
                name (``qijue``, 七绝) or line lengths (``5,7,5``), then settings after colons, e.g.
                ``qijue:xinyun:strict``, ``7,7,7,7:rhyme=2,4:bare``, ``wujue:heads=春夏秋冬``.

        Raises:
            ConfigError: it is none of these.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls._from_text(value)
        if not isinstance(value, Mapping):
            raise ConfigError(f"verse is {value!r}: give a form such as 'qijue' or '5,7,5', or a dict.")
        settings = dict(value)
        form = cls._named(str(settings.pop("form", "")) or _joined(settings.pop("lines", "")))
        known = {field.name for field in fields(cls)} - {"lines", "regulated"}
        unknown = sorted(settings.keys() - known)
        if unknown:
            names = ", ".join(sorted(known))
            raise ConfigError(f"verse has no {', '.join(unknown)}: it has form or lines, and {names}.")
        if "rhyme" in settings:
            settings["rhyme"] = _numbers(_joined(settings["rhyme"]), "rhyme")
        return replace(form, **settings)

    @classmethod
    def _from_text(cls, text: str) -> VerseForm:
        name, *words = text.strip().split(":")
        settings: dict[str, Any] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if equals:
                settings[key] = value
            else:
                kinds = {"tones": TONES, "book": BOOKS, "layout": LAYOUTS}
                fitting = [kind for kind, choices in kinds.items() if word in choices]
                if not fitting:
                    choices = ", ".join(choice for some in kinds.values() for choice in some)
                    raise ConfigError(
                        f"verse setting is {word!r}: choose one of {choices}, rhyme=, heads=."
                    )
                settings[fitting[0]] = word
        return cls.from_value({"form": name, **settings})

    @classmethod
    def _named(cls, name: str) -> VerseForm:
        name = {**_CHINESE_NAMES, **_LONG_NAMES}.get(name, name)
        if name in REGULATED:
            length, count = REGULATED[name]
            return cls((length,) * count, regulated=True)
        if not name or name[0].isalpha():
            raise ConfigError(
                f"verse is {name!r}: choose one of {', '.join(REGULATED)} ({', '.join(_CHINESE_NAMES)}), "
                "or give the characters of each line, such as 5,7,5."
            )
        return cls(_numbers(name, "lines"))


_FITS = set(REGULATED.values())


@dataclass(frozen=True)
class Scheme:
    """One way to fulfil a form.

    Args:
        patterns: for each line, those it may follow.
        rhyming: for each line, whether it rhymes.
    """

    patterns: tuple[tuple[str, ...], ...]
    rhyming: tuple[bool, ...]


def _joined(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(str(number) for number in value)


def _numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number.strip())
    except ValueError as error:
        raise ConfigError(f"verse {name} is {text!r}: give numbers with commas, such as 5,7,5.") from error
