"""The stream of a denoising objective: pairs of input and target, made of the text of a batch stream.

Sample i of a run takes its text from sample i of the stream underneath, and draws its denoiser and its
noise from the run's seed and i alone. So it is the same whatever the ranks, batch sizes and restarts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from mtnlg.config.data import DataConfig
from mtnlg.config.errors import ConfigError
from mtnlg.config.objective import Denoiser, ObjectiveConfig
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.tokens.fingerprint import Fingerprint, check_fingerprint
from mtnlg.tokens.noise import input_and_target, random_spans
from mtnlg.tokens.shuffle import seed_of, uniform
from mtnlg.tokens.stream import BatchStream

Pair = tuple[np.ndarray, np.ndarray]


def open_stream(
    data: DataConfig,
    split: str = "train",
    seed: int = 0,
    num_samples: int | None = None,
    vocab_size: int | None = None,
    has_encoder: bool = False,
) -> BatchStream | DenoisingStream:
    """The stream of ``data.objective``, for decoders or for encoder-decoders.

    Args:
        data: which token files, and what is predicted.
        split: as for :class:`BatchStream`, like ``seed`` and ``num_samples``.
        seed: of the shuffles and the noise.
        num_samples: end a fixed split after so many.
        vocab_size: refuse token ids that the model does not have.
        has_encoder: whether the model has an encoder.

    Raises:
        DataError: the token files cannot be used.
        ConfigError: the objective lacks ids of special tokens, or they do not fit.
    """
    text = BatchStream(text_of(data, has_encoder), split, seed, num_samples, vocab_size)
    if data.objective.is_causal:
        return text
    return DenoisingStream(text, data.objective, data.sequence_length, has_encoder, vocab_size)


def text_of(data: DataConfig, has_encoder: bool) -> DataConfig:
    """``data`` for the stream of text underneath: as long a piece as makes one sample."""
    if data.objective.is_causal:
        return data
    length = data.objective.text_length(data.sequence_length, has_encoder)
    return replace(data, sequence_length=length, objective=ObjectiveConfig())


class DenoisingStream:
    """Samples of a denoising objective by position; the methods of :class:`BatchStream`.

    For an encoder-decoder a batch has ``input_ids`` [rows, sequence_length], with ``encoder_mask`` where
    they may be short, ``decoder_input_ids`` and ``labels`` [rows, target]. For a decoder it has input and
    target one after the other, ``labels`` of the target alone, and ``prefix_lengths``.

    Args:
        text: the stream of text.
        objective: with the ids of the special tokens.
        sequence_length: tokens that an encoder, or else the decoder, reads.
        has_encoder: whether the model has an encoder.
        vocab_size: refuse special tokens that the model does not have.

    Raises:
        ConfigError: special tokens are missing or do not fit.
    """

    def __init__(
        self,
        text: BatchStream,
        objective: ObjectiveConfig,
        sequence_length: int,
        has_encoder: bool,
        vocab_size: int | None = None,
    ) -> None:
        self.text, self.objective, self.has_encoder = text, objective, has_encoder
        self.sequence_length = sequence_length
        self.denoisers = objective.chosen()
        self._sentinels = np.array(objective.sentinels(), dtype=np.int64)
        _check_tokens(objective, text.sequence_length, vocab_size)
        self._end, self._padding = objective.end_id or 0, objective.padding_id or 0
        self._start = self._padding if objective.start_id is None else objective.start_id
        weights = np.array([denoiser.weight for denoiser in self.denoisers])
        self._bounds = np.cumsum(weights) / weights.sum()
        self._target_length = objective.longest_target(sequence_length) if has_encoder else 0
        self._has_mask = objective.is_padded or not text.shuffled
        # Fixed splits are the same for every seed of a run.
        self._seed = seed_of("noise", text.seed if text.shuffled else 0)
        self.num_samples = text.num_samples
        described = {key: value for key, value in asdict(objective).items() if value not in (None, [])}
        described |= {"sequence_length": sequence_length, "has_encoder": has_encoder}
        self.fingerprint: Fingerprint = {**text.fingerprint, "objective": described}

    def batch(self, position: int, count: int, replica: int = 0, num_replicas: int = 1) -> Batch:
        """This replica's share of the samples ``position`` to ``position + count``.

        Rows past the end of a fixed split, and texts of one token, have only ignored labels.
        """
        text = self.text.batch(position, count, replica, num_replicas)
        first = position + count * replica // num_replicas
        lengths = _text_lengths(text)
        tokens = text.input_ids.numpy()
        pairs = [
            self.pair(tokens[row, : lengths[row]], first + row) if lengths[row] > 1 else None
            for row in range(len(tokens))
        ]
        return self._for_encoder(pairs) if self.has_encoder else self._for_decoder(pairs)

    def pair(self, tokens: np.ndarray, position: int) -> Pair:
        """Input and target of the text ``tokens`` [2 or more] at ``position``."""
        seed = seed_of(self._seed, position)
        which, where = uniform(2, seed)
        denoiser = self.denoisers[int(np.searchsorted(self._bounds, which, side="right"))]
        inputs, target = self._taken_apart(tokens, denoiser, seed, float(where))
        if denoiser.mode is not None:
            assert self.objective.mode_ids is not None
            inputs = np.concatenate([[self.objective.mode_ids[denoiser.mode]], inputs])
        return inputs, target

    def _taken_apart(self, tokens: np.ndarray, denoiser: Denoiser, seed: int, where: float) -> Pair:
        if denoiser.kind == "prefix":
            cut = len(tokens) - denoiser.suffix_length(len(tokens), where)
            return tokens[:cut], tokens[cut:]
        if denoiser.kind == "suffix":
            taken = np.zeros(len(tokens), dtype=bool)
            taken[-denoiser.suffix_length(len(tokens), where) :] = True
        else:
            taken = random_spans(len(tokens), *denoiser.noise_and_spans(len(tokens)), seed)
        inputs, target = input_and_target(tokens, taken, self._sentinels)
        return np.append(inputs, self._end), np.append(target, self._end)

    def _for_encoder(self, pairs: list[Pair | None]) -> Batch:
        inputs = np.full((len(pairs), self.sequence_length), self._padding)
        mask = np.zeros(inputs.shape, dtype=bool)
        mask[:, 0] = True  # attention over nothing at all has no value
        labels = np.full((len(pairs), self._target_length), IGNORED_LABEL)
        for row, pair in enumerate(pairs):
            if pair is not None:
                inputs[row, : len(pair[0])], mask[row, : len(pair[0])] = pair[0], True
                labels[row, : len(pair[1])] = pair[1]
        shifted = np.where(labels == IGNORED_LABEL, self._padding, labels)
        shifted = np.insert(shifted[:, :-1], 0, self._start, axis=1)
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(labels),
            decoder_input_ids=torch.from_numpy(shifted),
            encoder_mask=torch.from_numpy(mask) if self._has_mask else None,
        )

    def _for_decoder(self, pairs: list[Pair | None]) -> Batch:
        columns = self.sequence_length + 1
        tokens = np.full((len(pairs), columns), self._padding)
        labels = np.full((len(pairs), columns), IGNORED_LABEL)
        prefixes = np.zeros(len(pairs), dtype=np.int64)
        for row, pair in enumerate(pairs):
            if pair is not None:
                prefix, end = len(pair[0]), len(pair[0]) + len(pair[1])
                tokens[row, :end] = np.concatenate(pair)
                labels[row, prefix:end] = pair[1]
                prefixes[row] = prefix
        return Batch(
            torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
            torch.from_numpy(np.ascontiguousarray(labels[:, 1:])),
            prefix_lengths=torch.from_numpy(prefixes),
        )

    def state(self, position: int) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"fingerprint": self.fingerprint, "position": position}

    def check(self, state: dict[str, Any]) -> int:
        """The position in ``state``.

        Raises:
            DataError: the data, their settings or the objective are not those of ``state``.
        """
        check_fingerprint(state.get("fingerprint"), self.fingerprint)
        return self.text.check({**state, "fingerprint": self.text.fingerprint})

    def epochs(self, position: int) -> dict[str, float]:
        """How often the split of each corpus has been read after ``position`` samples, by path."""
        return self.text.epochs(position)

    def build(self, num_samples: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute and cache the indices that the first ``num_samples`` training samples read."""
        self.text.build(num_samples, progress)


def _text_lengths(text: Batch) -> list[int]:
    """Tokens of each row that are there. A row that is short ends with the token that has no label."""
    valid = (text.labels != IGNORED_LABEL).sum(dim=1)
    longest = text.labels.shape[1]
    return torch.where((valid > 0) & (valid < longest), valid + 1, valid).tolist()


def _check_tokens(objective: ObjectiveConfig, text_length: int, vocab_size: int | None) -> None:
    """Make sure that every special token is known and one that the model has."""
    sentinels, needed = objective.sentinels(), 0
    for denoiser in objective.chosen():
        if denoiser.kind != "prefix":
            spans = denoiser.kind == "spans"
            needed = max(needed, denoiser.noise_and_spans(text_length)[1] if spans else 1)
    problems = []
    if len(sentinels) < needed:
        problems.append(
            f"data.objective takes up to {needed} spans out of a text of {text_length} tokens, and there "
            f"are {len(sentinels)} sentinels (data.objective.sentinel_ids): use a tokenizer with more, "
            "longer spans or a shorter data.sequence_length."
        )
    if needed and objective.end_id is None:
        problems.append("data.objective.end_id is missing: the token that ends an input and a target.")
    if objective.padding_id is None:
        problems.append("data.objective.padding_id is missing: the token that fills up what is short.")
    known = objective.mode_ids or {}
    problems += [
        f"data.objective.mode_ids has no token for the mode {mode}."
        for mode in objective.modes()
        if mode not in known
    ]
    ids = [*sentinels, objective.end_id, objective.padding_id, objective.start_id, *known.values()]
    wrong = sorted({i for i in ids if i is not None and not 0 <= i < (vocab_size or i + 1)})
    if wrong:
        problems.append(
            f"data.objective names the token ids {', '.join(map(str, wrong))}, but the model's vocabulary "
            f"has only 0 to {(vocab_size or 1) - 1}: raise model.vocab_size."
        )
    if problems:
        raise ConfigError(problems)
