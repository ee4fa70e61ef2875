"""Everything the batch stream needs, computed ahead of a run, with what each corpus will give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mtnlg.config.data import DataConfig
from mtnlg.tokens.stream import BatchStream


@dataclass(frozen=True)
class CorpusReport:
    """One corpus of a blend.

    Args:
        path: prefix of its token files.
        share: of the training samples, the weights normalised.
        documents: of the whole corpus.
        train_documents: documents (or pieces of documents) in the train split.
        tokens: tokens of train, validation and test.
        split_by_documents: no document was cut to make the splits.
        samples: training samples it gives to the run.
        epochs: how often the run reads its train split.
    """

    path: str
    share: float
    documents: int
    train_documents: int
    tokens: tuple[int, int, int]
    split_by_documents: bool
    samples: int
    epochs: float


@dataclass(frozen=True)
class IndexReport:
    """The whole blend.

    Args:
        corpora: one report for each.
        num_samples: training samples reported on.
        num_tokens: tokens of all train splits.
    """

    corpora: list[CorpusReport]
    num_samples: int
    num_tokens: int

    def lines(self) -> list[str]:
        """The report as aligned text, a line for each corpus."""
        head = f"{'corpus':32} {'share':>7} {'documents':>11} {'train tokens':>15} {'epochs':>8}"
        rows = [
            f"{report.path[-32:]:32} {report.share:7.2%} {report.documents:11,} "
            f"{report.tokens[0]:15,} {report.epochs:8.2f}"
            for report in self.corpora
        ]
        return [head, *rows]


def build_index(
    data: DataConfig,
    seed: int = 0,
    num_samples: int | None = None,
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IndexReport:
    """Check the token files and cache the index of a run.

    A run may go on past what was built: the stream builds what is missing when it gets there.

    Args:
        data: the data section of a run's config, with ``blend`` filled.
        seed: the run's.
        num_samples: training samples of the run; ``None`` is one epoch of all tokens.
        vocab_size: refuse token files that hold other ids.
        progress: called with corpora done and corpora in all.

    Raises:
        DataError: a token file cannot be used, or a train split is empty.
    """
    stream = BatchStream(data, "train", seed, vocab_size=vocab_size)
    num_tokens = sum(part.num_tokens for part in stream.parts)
    if num_samples is None:
        num_samples = max(1, num_tokens // data.sequence_length)
    stream.build(num_samples, progress)
    counts = stream.blend.counts(num_samples).tolist()
    epochs = stream.epochs_of_counts(counts)
    shares = data.split_shares()
    reports = [
        CorpusReport(
            path=corpus.prefix,
            share=weight / stream.blend.period,
            documents=corpus.num_documents,
            train_documents=len(part.lengths),
            tokens=tuple(corpus.part(shares, name).num_tokens for name in ("train", "validation", "test")),  # type: ignore[arg-type]
            split_by_documents=part.by_documents,
            samples=count,
            epochs=epoch,
        )
        for corpus, part, weight, count, epoch in zip(
            stream.corpora, stream.parts, stream.blend.weights, counts, epochs
        )
    ]
    return IndexReport(reports, num_samples, num_tokens)
