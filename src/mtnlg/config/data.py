"""What to train on: raw sources or token files, their blend, and how samples are cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mtnlg.config.errors import ConfigError
from mtnlg.config.objective import ObjectiveConfig

ENCODING_ERRORS = ("strict", "replace", "ignore")


@dataclass
class TokenizerConfig:
    """Which tokenizer a run uses.

    Args:
        path: a Hugging Face tokenizer folder; ``None`` trains one from ``data.sources``.
        vocab_size: size to train, special tokens included.
        han_characters: the most Han characters of a token that is trained. With 1 each is a token of
            its own, which suits verse, where characters are counted.
        sets_vocab_size: once the tokenizer is there, ``model.vocab_size`` becomes its size; set for
            recipes that leave ``model.vocab_size`` out.
    """

    path: str | None = None
    vocab_size: int = 8192
    han_characters: int = 2
    sets_vocab_size: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.vocab_size < 300:
            problems.append(
                f"tokenizer.vocab_size is {self.vocab_size}: at least 300 are needed "
                "(256 bytes and the special tokens)."
            )
        if self.han_characters < 1:
            problems.append(f"tokenizer.han_characters is {self.han_characters}: it must be at least 1.")
        if problems:
            raise ConfigError(problems)


@dataclass
class BlendEntry:
    """One corpus of a blend.

    Args:
        path: prefix of a ``.bin``/``.idx`` pair.
        weight: share of the samples; weights are normalised over the blend.
    """

    path: str
    weight: float = 1.0


@dataclass
class SourceEntry:
    """One raw corpus that ``mtnlg train`` encodes itself into the run's folder.

    Args:
        path: a file, folder or glob pattern of text, JSON Lines or Parquet.
        weight: share of the samples; ``None`` weighs each source by its tokens.
        text_key: the field of JSON Lines or Parquet that holds the text.
    """

    path: str
    weight: float | None = None
    text_key: str = "text"


@dataclass
class DataConfig:
    """The data stream.

    Args:
        blend: token files with their weights. Exclusive with ``sources``.
        sources: raw files to tokenize and encode first (kept in the run's folder).
        split: shares of train, validation and test documents, e.g. ``98,1,1``: contiguous ranges of
            each file; a file of too few documents is cut by tokens.
        sequence_length: tokens of one sample (each sample reads one more for its labels).
        encoding_errors: what to do with bytes of ``sources`` that are not UTF-8: ``strict`` stops and
            says where, ``replace`` and ``ignore`` go on.
        reset_at_document_boundaries: attention and positions start anew at each document.
        cache_dir: where index files are kept; ``None`` is ``PREFIX.index`` beside each token file.
        seed: of the shuffles; ``None`` is the run's seed.
        objective: what is predicted: every next token, or what was taken out of the text.
    """

    blend: list[BlendEntry] = field(default_factory=list)
    sources: list[SourceEntry] = field(default_factory=list)
    split: str = "98,1,1"
    sequence_length: int = 1024
    encoding_errors: str = "strict"
    reset_at_document_boundaries: bool = False
    cache_dir: str | None = None
    seed: int | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def __post_init__(self) -> None:
        problems = []
        if self.sequence_length < 1:
            problems.append(f"data.sequence_length is {self.sequence_length}: it must be at least 1.")
        if self.encoding_errors not in ENCODING_ERRORS:
            problems.append(
                f"data.encoding_errors is {self.encoding_errors!r}: choose one of "
                f"{', '.join(ENCODING_ERRORS)}."
            )
        if self.reset_at_document_boundaries and not self.objective.is_causal:
            problems.append(
                f"data.reset_at_document_boundaries is true: data.objective.name {self.objective.name} "
                "takes texts as they follow each other; leave one of them out."
            )
        if self.blend and self.sources:
            problems.append("data.blend and data.sources are both given: give only one of them.")
        entries: list[BlendEntry | SourceEntry] = [*self.blend, *self.sources]
        for entry in entries:
            if entry.weight is not None and not 0 < entry.weight < math.inf:
                problems.append(
                    f"data: weight of {entry.path} is {entry.weight}: it must be a finite number above 0."
                )
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            problems.append("data.sources: give a weight to every source or to none.")
        try:
            self.split_shares()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(problems)

    def target_length(self, has_encoder: bool) -> int:
        """Tokens that an encoder-decoder's decoder writes of each sample; 0 of a decoder's."""
        if not has_encoder:
            return 0
        if self.objective.is_causal:  # of conversations, as long as what is read at most
            return self.objective.target_length or self.sequence_length
        return self.objective.longest_target(self.sequence_length)

    def split_shares(self) -> tuple[float, float, float]:
        """Shares of train, validation and test, summing to 1.

        Raises:
            ValueError: ``split`` is not three numbers with a positive sum and train share.
        """
        try:
            shares = [float(part) for part in self.split.split(",")]
        except ValueError:
            shares = []
        finite = all(math.isfinite(share) for share in shares)
        if len(shares) != 3 or not finite or min(shares) < 0 or shares[0] <= 0:
            raise ValueError(
                f"data.split is {self.split!r}: give three numbers such as 98,1,1 "
                "(train, validation, test)."
            )
        total = sum(shares)
        return shares[0] / total, shares[1] / total, shares[2] / total
