"""One share of an encoding job: read some slices of files, encode them, write a part."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mtnlg.tokens.cutting import Cutter, cut
from mtnlg.tokens.documents import FileSlice, ReadOptions, read_fragments
from mtnlg.tokens.encoders import CheckedEncoder
from mtnlg.tokens.split_pattern import GPT2_PATTERN, GPT4_PATTERN, QWEN2_PATTERN, split_pattern
from mtnlg.tokens.token_writer import TokenFileWriter
from mtnlg.tokens.tokenizer import Tokenizer

BATCH_CHARACTERS = 400_000  # encoded at once: bounds the memory of a worker
BATCH_TEXTS = 2_048
REPORT_SECONDS = 0.2


@dataclass
class Counts:
    """What was read and written so far."""

    disk_bytes: int = 0
    num_bytes: int = 0
    characters: int = 0
    tokens: int = 0
    documents: int = 0

    def add(self, other: dict[str, int]) -> None:
        """Add the numbers of another count."""
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class EncodeSettings:
    """What every task of a job shares.

    Args:
        reading: how documents are taken out of files.
        append_end_of_text: end each document that is not empty with the end-of-text token.
        engine: see ``mtnlg.tokens.encoders``.
    """

    reading: ReadOptions = field(default_factory=ReadOptions)
    append_end_of_text: bool = True
    engine: str = "auto"


class Encoding:
    """Encodes slices of files; made once per process.

    Args:
        tokenizer: gives the ids.
        settings: of the job.
    """

    def __init__(self, tokenizer: Tokenizer, settings: EncodeSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.encoder = CheckedEncoder(tokenizer, settings.engine)
        self.own_pattern, self.cuttable = cutting_of(tokenizer)
        self.end = tokenizer.end_of_text_id if settings.append_end_of_text else None

    def run(
        self,
        slices: Sequence[FileSlice],
        prefix: str,
        facts: dict[str, Any],
        report: Callable[[Counts], None],
    ) -> Counts:
        """Write the documents of ``slices`` to the token file ``prefix``.

        Args:
            slices: read one after the other.
            prefix: of the part.
            facts: noted beside it.
            report: called now and then with the counts so far.
        """
        counts = Counts()
        with TokenFileWriter(prefix, self.tokenizer.vocab_size, facts=facts) as writer:
            batch = _Batch(self, writer, counts, report)
            for part in slices:
                for fragment in read_fragments(part, self.settings.reading):
                    counts.disk_bytes += fragment.disk_bytes
                    counts.num_bytes += fragment.num_bytes
                    batch.add(fragment.text, fragment.last)
            batch.flush()
            writer.facts |= {"counts": vars(counts), "engine": self.encoder.name}
        report(counts)
        return counts


class _Batch:
    """Gathers texts until they are worth a call of the encoder.

    Whole short documents are encoded together; the pieces of a long one also, as parts of it.
    """

    def __init__(
        self, job: Encoding, writer: TokenFileWriter, counts: Counts, report: Callable[[Counts], None]
    ) -> None:
        self._job, self._writer, self._counts, self._report = job, writer, counts, report
        self._texts: list[str] = []
        self._ends: list[bool] = []  # whether a document ends after the text
        self._size = 0
        self._cutter: Cutter | None = None  # while a document arrives in fragments
        self._told = time.monotonic()

    def add(self, text: str, last: bool) -> None:
        """Take a fragment; ``last`` ends its document."""
        self._counts.characters += len(text)
        if self._cutter is None and last:
            self._put_document(text)
            return
        if self._cutter is None:
            self._cutter = Cutter(self._job.own_pattern, self._job.cuttable)
        ready = self._cutter.feed(text)
        if last:
            self._put_document(ready + self._cutter.rest())
            self._cutter = None
        elif ready:
            for piece in self._pieces(ready):
                self._put(piece, False)

    def _put_document(self, text: str) -> None:
        before = None
        for piece in self._pieces(text) if len(text) > BATCH_CHARACTERS else ():
            if before is not None:
                self._put(before, False)
            before = piece
        self._put(text if before is None else before, True)

    def _pieces(self, text: str) -> Iterator[str]:
        if not self._job.cuttable:
            yield text
        else:
            yield from cut(text, BATCH_CHARACTERS, self._job.own_pattern)

    def _put(self, text: str, last: bool) -> None:
        self._texts.append(text)
        self._ends.append(last)
        self._size += len(text)
        if self._size >= BATCH_CHARACTERS or len(self._texts) >= BATCH_TEXTS:
            self.flush()

    def flush(self) -> None:
        """Encode what was gathered and hand it to the writer."""
        if not self._texts:
            return
        ids, lengths = self._job.encoder(self._texts)
        tokens = self._write(ids, lengths, np.asarray(self._ends, dtype=bool))
        self._counts.tokens += tokens
        self._counts.documents += sum(self._ends)
        self._texts, self._ends, self._size = [], [], 0
        if time.monotonic() - self._told > REPORT_SECONDS:
            self._told = time.monotonic()
            self._report(self._counts)

    def _write(self, ids: npt.NDArray[Any], lengths: npt.NDArray[Any], ends: npt.NDArray[Any]) -> int:
        """Write the texts' ids as documents, an end of text after each that is not empty."""
        stops = np.cumsum(lengths)[ends]  # [documents] where each one ends in ``ids``
        done = int(stops[-1]) if len(stops) else 0
        whole, rest = ids[:done], ids[done:]
        if len(stops):
            sizes = np.diff(stops, prepend=0)
            if self._job.end is not None:
                filled = sizes > 0
                filled[0] |= self._writer.open_length > 0
                whole = np.insert(whole, stops[filled], self._job.end)
                sizes = sizes + filled
            self._writer.add_documents(whole, sizes)
        if len(rest):
            self._writer.add_tokens(rest)
        return len(whole) + len(rest)


def cutting_of(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Whether the tokenizer uses our own split pattern, and whether its texts may be cut at all."""
    definition = json.loads(tokenizer.definition)
    if definition.get("normalizer"):
        return False, False
    text = json.dumps(definition.get("pre_tokenizer"))
    own = json.dumps(split_pattern())[1:-1] in text
    byte_level = '"ByteLevel"' in text and '"add_prefix_space": true' not in text
    if own and byte_level:
        return True, True
    known = [json.dumps(pattern)[1:-1] in text for pattern in _KNOWN_PATTERNS]
    alone = re.fullmatch(r'\{"type": "ByteLevel".*"use_regex": true\}', text) is not None
    return False, byte_level and (any(known) or alone)


# Split patterns besides our own in which the places of ``cutting`` are always cuts.
_KNOWN_PATTERNS = (GPT2_PATTERN, GPT4_PATTERN, QWEN2_PATTERN)
