"""Text that is already on every machine: Python's own documentation and code, and our Chinese pieces.

The demo trains on it, so that the whole way can be walked without a download.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mtnlg.config import DataError

TOPIC_BYTES = 2_000_000  # all of it today
CODE_BYTES = 800_000  # of the standard library; more would only lengthen the tokenizer's training
LONGEST_CODE_FILE = 120_000
LEFT_OUT_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
TITLE = re.compile(r"^# ", re.MULTILINE)
CHINESE_FOLDER = Path(__file__).parents[3] / "data" / "zh"


@dataclass(frozen=True)
class DemoSources:
    """The JSON Lines files of the demo's corpora; ``chinese`` is ``None`` where its texts are not there."""

    english: Path
    code: Path
    chinese: Path | None


def gather_demo_sources(folder: str | Path, chinese_folder: Path = CHINESE_FOLDER) -> DemoSources:
    """Write the demo's corpora as JSON Lines; files that are already there stay as they are.

    Args:
        folder: where ``english.jsonl``, ``code.jsonl`` and ``chinese.jsonl`` go.
        chinese_folder: text files whose pieces begin with a line ``# title``.

    Raises:
        DataError: this Python has neither documentation topics nor its library's source.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    has_chinese = any(chinese_folder.glob("*.txt"))
    sources = DemoSources(
        english=folder / "english.jsonl",
        code=folder / "code.jsonl",
        chinese=folder / "chinese.jsonl" if has_chinese else None,
    )
    _write_documents(sources.english, _up_to(TOPIC_BYTES, documentation_topics()))
    _write_documents(sources.code, _up_to(CODE_BYTES, library_code()))
    if sources.chinese is not None:
        _write_documents(sources.chinese, titled_pieces(chinese_folder))
    return sources


def documentation_topics() -> Iterator[tuple[str, str]]:
    """(name, text) of each topic of the language reference that ``help()`` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        for part, section in enumerate(_sections(topics[name])):
            yield f"{name}-{part}", section


def library_code() -> Iterator[tuple[str, str]]:
    """(path, text) of the modules of the standard library: plain modules first, then packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: (len(path.parts), path)):
        relative = path.relative_to(root)
        if LEFT_OUT_FOLDERS.intersection(relative.parts) or path.stat().st_size > LONGEST_CODE_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a module that declares another encoding
        yield str(relative), text


def titled_pieces(folder: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of each piece in a folder's text files; a line ``# title`` begins a piece."""
    for path in sorted(folder.glob("*.txt")):
        for piece in TITLE.split(path.read_text(encoding="utf-8"))[1:]:
            title, _, body = piece.partition("\n")
            yield f"{path.stem}/{title}", f"{title}\n{body.strip()}\n"


def _up_to(limit_bytes: int, documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The first documents, up to ``limit_bytes`` of text in all."""
    taken = 0
    for name, text in documents:
        taken += len(text.encode("utf-8"))
        if taken > limit_bytes:
            return
        yield name, text


def _sections(text: str, smallest: int = 1500) -> Iterator[str]:
    """A long topic in parts of at least ``smallest`` characters, cut at blank lines before text."""
    part: list[str] = []
    length = 0
    for paragraph in text.split("\n\n"):
        if length >= smallest and not paragraph.startswith(" "):
            yield "\n\n".join(part) + "\n"
            part, length = [], 0
        part.append(paragraph)
        length += len(paragraph)
    if part:
        yield "\n\n".join(part) + "\n"


def _write_documents(path: Path, documents: Iterable[tuple[str, str]]) -> None:
    if path.exists():
        return
    temporary = path.with_suffix(f".{os.getpid()}")
    count = 0
    with temporary.open("w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"id": name, "text": text}, ensure_ascii=False) + "\n")
            count += 1
    if not count:
        temporary.unlink()
        raise DataError(f"{path.stem}: this Python installation has no such text to train on.")
    os.replace(temporary, path)
