"""Learning the merges of a byte-level tokenizer with the ``tokenizers`` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.config.progress import Progress, no_progress
from mtnlg.tokens.cutting import cut
from mtnlg.tokens.documents import FileSlice, ReadOptions, read_fragments
from mtnlg.tokens.sources import find_files
from mtnlg.tokens.split_pattern import HAN_RUN_LEARNING, split_pattern
from mtnlg.tokens.tokenizer import Tokenizer

# The library gathers 256 items before it counts them: small ones keep that buffer small.
PIECE_CHARACTERS = 16_384
# One text in so many is kept out of the training, to measure characters per token on.
HELD_OUT_EVERY = 50
_HELD_OUT_CHARACTERS = 1_000_000
SAMPLE_BYTES = 100_000_000


@dataclass(frozen=True)
class TokenizerReport:
    """What a tokenizer was trained on, and how well it packs text.

    Args:
        num_bytes: read, of all sources.
        num_characters: that were trained on.
        characters_per_token: on text that was kept out of the training where there was enough of it.
        bytes_per_token: on the same text, in UTF-8.
        held_out: whether that text was kept out.
    """

    num_bytes: int
    num_characters: int
    characters_per_token: float
    bytes_per_token: float
    held_out: bool


def train_on_files(
    sources: Sequence[str | os.PathLike[str]],
    vocab_size: int,
    reading: ReadOptions | None = None,
    min_frequency: int = 2,
    sample_bytes: int = SAMPLE_BYTES,
    progress: Progress = no_progress,
    show_progress: bool = False,
    han_characters: int = HAN_RUN_LEARNING,
) -> tuple[Tokenizer, TokenizerReport]:
    """Train a tokenizer on files, on an even sample where there is more text than needed.

    Args:
        sources: files, folders and patterns, see ``read_documents``.
        vocab_size: as in ``Tokenizer.train``, like ``min_frequency``, ``show_progress`` and
            ``han_characters``.
        reading: how documents are taken out of the files.
        min_frequency: how often a pair must occur.
        sample_bytes: the most text, in bytes on disk, to train on; it bounds the memory.
        progress: told the bytes read.
        show_progress: let the library draw its bars.
        han_characters: the most Han characters of a token.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a source cannot be read (says where), or there is no text.
    """
    if sample_bytes < 1:
        raise ConfigError(f"sample_bytes is {sample_bytes}: it must be at least 1.")
    texts = _Sample(sources, reading or ReadOptions(), sample_bytes, progress)
    tokenizer = Tokenizer.train(texts, vocab_size, min_frequency, show_progress, (), han_characters)
    measured = texts.held_out or texts.first
    characters, tokens = sum(map(len, measured)), 0
    for text in measured:
        tokens += len(tokenizer.encode(text))
    return tokenizer, TokenizerReport(
        num_bytes=texts.num_bytes,
        num_characters=texts.num_characters,
        characters_per_token=characters / max(tokens, 1),
        bytes_per_token=sum(len(text.encode("utf-8")) for text in measured) / max(tokens, 1),
        held_out=bool(texts.held_out),
    )


class _Sample:
    """An even share of the texts in files; keeps a few apart to measure on."""

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str]],
        reading: ReadOptions,
        sample_bytes: int,
        progress: Progress,
    ) -> None:
        self._files = find_files(sources)
        self._reading, self._progress = reading, progress
        self._total = sum(file.size for file in self._files)
        self._share = min(1.0, sample_bytes / self._total)
        self.num_bytes = self.num_characters = 0
        self.held_out: list[str] = []
        self.first: list[str] = []

    def __iter__(self) -> Iterator[str]:
        seen = taken = number = 0
        for file in self._files:
            for fragment in read_fragments(FileSlice(file), self._reading):
                seen += fragment.disk_bytes
                self.num_bytes += fragment.num_bytes
                self._progress("reading", min(seen, self._total), self._total, "bytes")
                if not fragment.text or taken > self._share * seen:
                    continue
                taken += fragment.disk_bytes
                number += 1
                if number % HELD_OUT_EVERY == 0 and _has_room(self.held_out):
                    self.held_out.append(fragment.text)
                    continue
                if number < HELD_OUT_EVERY and _has_room(self.first):
                    self.first.append(fragment.text)
                self.num_characters += len(fragment.text)
                yield fragment.text


def _has_room(texts: list[str]) -> bool:
    return sum(map(len, texts)) < _HELD_OUT_CHARACTERS


def learn_definition(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    min_frequency: int = 2,
    show_progress: bool = False,
    pattern: str | None = None,
    han_characters: int = HAN_RUN_LEARNING,
) -> str:
    """The content of a ``tokenizer.json`` learned from ``texts`` (arguments as in ``Tokenizer.train``).

    Args:
        texts: what to learn from.
        vocab_size: tokens in all.
        special_tokens: reserved names, which get the first ids.
        min_frequency: how often a pair must occur.
        show_progress: draw the library's bars.
        pattern: another split pattern, used for learning and encoding alike; for comparisons.
        han_characters: the most Han characters of a token.

    Raises:
        DataError: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = _pre_tokenizer(pattern or split_pattern(han_characters))
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    pieces = _Pieces(texts)
    core.train_from_iterator(pieces, trainer)
    if not pieces.characters:
        raise DataError("there is no text to train a tokenizer on: every document is empty.")
    core.pre_tokenizer = _pre_tokenizer(pattern or split_pattern())
    return json.dumps(json.loads(core.to_str()), ensure_ascii=False, indent=1) + "\n"


class _Pieces:
    """Cuts the texts into small pieces at safe places and counts their characters."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield from cut(text, PIECE_CHARACTERS)


def _pre_tokenizer(pattern: str):  # type: ignore[no-untyped-def]  # a class of the Rust library
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
