"""Learning the merges of a byte-level tokenizer with the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from mtnlg.config.errors import DataError
from mtnlg.tokens.cutting import cut
from mtnlg.tokens.split_pattern import HAN_RUN_LEARNING, split_pattern

# The library gathers 256 items before it counts them: small ones keep that buffer small.
PIECE_CHARACTERS = 16_384


def learn_definition(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    min_frequency: int = 2,
    show_progress: bool = False,
    pattern: str | None = None,
) -> str:
    """The content of a ``tokenizer.json`` learned from ``texts`` (arguments as in ``Tokenizer.train``).

    Args:
        texts: what to learn from.
        vocab_size: tokens in all.
        special_tokens: reserved names, which get the first ids.
        min_frequency: how often a pair must occur.
        show_progress: draw the library's bars.
        pattern: another split pattern, used for learning and encoding alike; for comparisons.

    Raises:
        DataError: there is no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = _pre_tokenizer(pattern or split_pattern(HAN_RUN_LEARNING))
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
