"""The batch stream: sample i of a run is the same whatever the ranks, batch sizes and restarts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtnlg.config.data import DataConfig
from mtnlg.config.errors import DataError
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.tokens.blend import Blend
from mtnlg.tokens.fingerprint import Fingerprint, check_fingerprint, make_fingerprint
from mtnlg.tokens.index_cache import IndexCache
from mtnlg.tokens.samples import FixedSamples, PackedSamples, Runs
from mtnlg.tokens.shuffle import permutation, seed_of
from mtnlg.tokens.split import Part, split_name
from mtnlg.tokens.token_corpus import TokenCorpus

_GATHER_FROM = 6  # runs; fewer are copied one by one
_BLOCKS_WORTH_KEEPING = 32  # of the blend, about three seconds of computing


class BatchStream:
    """Samples of a blend by position.

    ``train`` is shuffled and endless: corpora take turns by their weights, and each goes through its
    epochs at its own pace. The other splits are fixed: every token of every corpus once, in an order
    that depends on nothing but the files, so that the first samples are a fair choice of all.

    Args:
        data: which token files, shares, sequence length; ``data.blend`` must be filled.
        split: ``train``, ``validation`` (``valid``), ``test``, or ``all`` of every file.
        seed: of the shuffles, unless ``data.seed`` is given.
        num_samples: end a fixed split after this many samples; training's stream has no end.
        vocab_size: refuse token ids that the model does not have.
        shuffle: ``None`` shuffles ``train`` only; ``False`` reads ``train`` once and in fixed order.

    Raises:
        DataError: no token files given, one cannot be used, or the split holds nothing to predict.
    """

    def __init__(
        self,
        data: DataConfig,
        split: str = "train",
        seed: int = 0,
        num_samples: int | None = None,
        vocab_size: int | None = None,
        shuffle: bool | None = None,
    ) -> None:
        self.split = split_name(split)
        self.shuffled = self.split == "train" if shuffle is None else shuffle
        self.sequence_length = data.sequence_length
        self.seed = seed if data.seed is None else data.seed
        self._reset, self._vocab_size = data.reset_at_document_boundaries, vocab_size
        if not data.blend:
            raise DataError("data.blend names no token files: encode data.sources first (mtnlg encode).")
        self.corpora = [TokenCorpus(entry.path, vocab_size) for entry in data.blend]
        weights = [entry.weight for entry in data.blend]
        shares = data.split_shares()
        self.parts = [corpus.part(shares, self.split) for corpus in self.corpora]
        _require_tokens(self.split, data, self.corpora, self.parts, every_corpus=self.shuffled)
        self.fingerprint: Fingerprint = make_fingerprint(
            self.corpora,
            weights,
            self.split,
            shares,
            self.sequence_length,
            self.seed if self.shuffled else 0,
        )
        self._packed: list[PackedSamples] = []
        self._fixed: list[FixedSamples] = []
        if self.shuffled:
            self._cache = IndexCache(_index_folder(data, self.corpora[0]))
            self._blend_name = f"blend-{_key([float(weight) for weight in weights])}"
            known = self._cache.load(self._blend_name)
            self.blend = Blend(weights, None if known is None else known["starts"])
            self._packed = [self._pack(data, index) for index in range(len(self.corpora))]
            self.num_samples = None
        else:
            self._fixed = [FixedSamples(part, self.sequence_length) for part in self.parts]
            self._firsts = np.cumsum([0] + [fixed.num_samples for fixed in self._fixed])
            total = int(self._firsts[-1])
            self._order = permutation(total, seed_of("fixed order"))
            self.num_samples = total if num_samples is None else min(total, num_samples)

    #: samples of a fixed split; ``None`` where the stream has no end
    num_samples: int | None

    def batch(self, position: int, count: int, replica: int = 0, num_replicas: int = 1) -> Batch:
        """This replica's share of the samples ``position`` to ``position + count``.

        Replica r of R takes rows ``count * r // R`` to ``count * (r + 1) // R`` of the global batch.
        Rows past the end of a fixed split have only ignored labels, so that all batches of an
        evaluation have the same shape.

        Returns:
            tensors [rows, sequence_length].

        Raises:
            DataError: a token id is outside the vocabulary.
        """
        if position < 0 or count < 0 or not 0 <= replica < num_replicas:
            raise ValueError(f"no batch at position {position}, count {count}, {replica} of {num_replicas}")
        first, stop = count * replica // num_replicas, count * (replica + 1) // num_replicas
        rows = _Rows(stop - first, self.sequence_length, self._reset)
        for row, (corpus, number) in enumerate(self._locate(position + first, stop - first)):
            runs = (self._packed if self.shuffled else self._fixed)[corpus].runs(number)
            rows.fill(row, self.corpora[corpus].tokens, runs)
        if self._vocab_size is not None:
            rows.check_vocabulary(self._vocab_size)
        return rows.batch()

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps: plain values that no layout or batch size is in."""
        return {"fingerprint": self.fingerprint, "position": position}

    def check(self, state: dict[str, Any]) -> int:
        """The position in ``state``.

        Raises:
            DataError: the data or their settings are not those of ``state``; says what changed.
        """
        check_fingerprint(state.get("fingerprint"), self.fingerprint)
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise DataError(
                f"the saved position in the data is {position!r}: expected a number of samples."
            )
        return position

    def epochs(self, position: int) -> dict[str, float]:
        """How often the split of each corpus has been read after ``position`` samples, by path."""
        if self.shuffled:
            shares = self.epochs_of_counts(self.blend.counts(position).tolist())
        else:
            assert self.num_samples is not None
            shares = [min(position, self.num_samples) / max(len(self._order), 1)] * len(self.corpora)
        return {corpus.prefix: share for corpus, share in zip(self.corpora, shares)}

    def epochs_of_counts(self, counts: list[int]) -> list[float]:
        """Epochs that so many samples of each corpus take."""
        return [packed.epochs(count) for packed, count in zip(self._packed, counts)]

    def build(self, num_samples: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute and cache the indices that the first ``num_samples`` training samples read."""
        counts = self.blend.counts(num_samples).tolist() if self.shuffled else []
        if self.shuffled and len(self.blend.block_starts) >= _BLOCKS_WORTH_KEEPING:
            self._cache.replace(self._blend_name, {"starts": self.blend.block_starts})
        for done, (packed, count) in enumerate(zip(self._packed, counts)):
            if count:
                packed.build(count)
            if progress is not None:
                progress(done + 1, len(counts))

    def _pack(self, data: DataConfig, index: int) -> PackedSamples:
        corpus, part = self.corpora[index], self.parts[index]
        key = _key([corpus.digest, part.start, part.stop, self.sequence_length, self.seed])
        cache = IndexCache(_index_folder(data, corpus) / key)
        return PackedSamples(part, self.sequence_length, key, cache)

    def _locate(self, position: int, count: int) -> list[tuple[int, int]]:
        if self.shuffled:
            corpora, numbers = self.blend.locate(position, count)
            return list(zip(corpora.tolist(), numbers.tolist()))
        assert self.num_samples is not None
        chosen = self._order[position : min(position + count, self.num_samples)]
        corpora = np.searchsorted(self._firsts, chosen, side="right") - 1
        return list(zip(corpora.tolist(), (chosen - self._firsts[corpora]).tolist()))


def _key(described: list[Any]) -> str:
    return hashlib.blake2b(json.dumps(described).encode(), digest_size=8).hexdigest()


def _index_folder(data: DataConfig, corpus: TokenCorpus) -> Path:
    return Path(data.cache_dir) / corpus.name if data.cache_dir else Path(f"{corpus.prefix}.index")


class _Rows:
    """A batch while it is filled, [rows, sequence_length + 1]."""

    def __init__(self, rows: int, sequence_length: int, reset: bool) -> None:
        self._columns = np.arange(sequence_length + 1)
        self.tokens = np.zeros((rows, sequence_length + 1), dtype=np.int64)
        self.ends = np.zeros(rows, dtype=np.int64)  # tokens that are there
        self.documents = np.zeros_like(self.tokens) if reset else None
        self.positions = np.zeros_like(self.tokens) if reset else None

    def fill(self, row: int, tokens: np.ndarray, runs: Runs) -> None:
        """Copy the runs of one sample."""
        begins, lengths = runs
        starts = np.cumsum(lengths) - lengths  # where in the row each run goes
        length = self.ends[row] = int(lengths.sum())
        if len(lengths) < _GATHER_FROM:
            for begin, start, count in zip(begins.tolist(), starts.tolist(), lengths.tolist()):
                self.tokens[row, start : start + count] = tokens[begin : begin + count]
        else:
            self.tokens[row, :length] = tokens[self._columns[:length] + np.repeat(begins - starts, lengths)]
        if self.documents is not None and self.positions is not None:
            self.documents[row, :length] = np.repeat(np.arange(len(lengths)), lengths)
            self.documents[row, length:] = len(lengths)
            self.positions[row, :length] = self._columns[:length] - np.repeat(starts, lengths)

    def check_vocabulary(self, vocab_size: int) -> None:
        if self.tokens.size and not (self.tokens.min() >= 0 and self.tokens.max() < vocab_size):
            wrong = self.tokens[(self.tokens < 0) | (self.tokens >= vocab_size)][0]
            raise DataError(
                f"the token files hold token id {wrong}, but the model's vocabulary has only 0 to "
                f"{vocab_size - 1}: they were made with another tokenizer."
            )

    def batch(self) -> Batch:
        labels = self.tokens[:, 1:].copy()
        labels[self._columns[1:] >= self.ends[:, None]] = IGNORED_LABEL
        inputs = torch.from_numpy(np.ascontiguousarray(self.tokens[:, :-1]))
        if self.documents is None or self.positions is None:
            return Batch(inputs, torch.from_numpy(labels))
        positions = torch.from_numpy(np.ascontiguousarray(self.positions[:, :-1]))
        documents = torch.from_numpy(np.ascontiguousarray(self.documents[:, :-1]))
        return Batch(inputs, torch.from_numpy(labels), positions, documents)


def _require_tokens(
    split: str, data: DataConfig, corpora: list[TokenCorpus], parts: list[Part], every_corpus: bool
) -> None:
    """Training needs tokens of every corpus of the blend, evaluation something to predict in any."""
    if every_corpus:
        empty = [corpus.prefix for corpus, part in zip(corpora, parts) if part.num_tokens < 2]
    else:
        empty = [corpus.prefix for corpus in corpora]
        if any(part.num_tokens >= 2 for part in parts):
            empty = []
    if empty:
        raise DataError(
            f"the {split} split of {', '.join(empty)} holds no tokens to predict "
            f"(data.split is {data.split!r}): give it a share, or more text."
        )
