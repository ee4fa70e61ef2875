"""How well a model predicts a text: perplexity, bits per byte and bits per character.

All of them come from one sum: the negative log-likelihood of every token of the text, each predicted
once. Perplexity is ``exp(sum / tokens)`` and depends on the tokenizer; bits per byte and per character,
``sum / (bytes · ln 2)``, compare models of any tokenizer. End-of-text tokens are predicted and paid for,
and hold no bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtnlg.config import ConfigError, DataError
from mtnlg.config.progress import Progress, no_progress
from mtnlg.evaluation.texts import EvaluationText, texts_of_files, texts_of_run
from mtnlg.evaluation.windows import Window, cut_windows, make_batch
from mtnlg.model import MegatronLmDecoder
from mtnlg.tokens import Tokenizer

BATCH_SIZE = 8


@dataclass
class Score:
    """Sums over a text, and what follows from them.

    Args:
        nll: summed negative log-likelihood in nats.
        num_tokens: tokens predicted.
        num_documents: documents.
        num_bytes: of the text in UTF-8.
        num_characters: of the text.
    """

    nll: float = 0.0
    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0
    num_characters: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats a token."""
        return self.nll / self.num_tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700.0 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits a UTF-8 byte."""
        return self.nll / (self.num_bytes * math.log(2.0)) if self.num_bytes else math.inf

    @property
    def bits_per_character(self) -> float:
        """Bits a Unicode character."""
        return self.nll / (self.num_characters * math.log(2.0)) if self.num_characters else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is infinite is ``None``."""
        ratios = ("loss", "perplexity", "bits_per_byte", "bits_per_character")
        values = {name: getattr(self, name) for name in ratios}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        sums = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**finite, **sums}


@dataclass
class PerplexityResult:
    """The score of each source and of all together.

    Args:
        sources: by name, in order.
        window: longest input, tokens.
        stride: tokens between the beginnings of windows; equal to ``window`` when side by side.
        seconds: the evaluation took.
    """

    sources: dict[str, Score]
    window: int
    stride: int
    seconds: float

    @property
    def total(self) -> Score:
        """All sources together."""
        return sum(self.sources.values(), Score())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the total's at the top, each source's under ``sources``."""
        sources = {name: score.to_dict() for name, score in self.sources.items()}
        facts = {"window": self.window, "stride": self.stride, "seconds": self.seconds}
        return {**self.total.to_dict(), **facts, "sources": sources}


def evaluate_run(
    model: MegatronLmDecoder,
    tokenizer: Tokenizer,
    run_dir: str | Path,
    split: str = "validation",
    *,
    max_tokens: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> PerplexityResult:
    """Evaluate on a split of a run's own data, in windows of its ``sequence_length``.

    Args:
        model: the decoder.
        tokenizer: the run's.
        run_dir: the run's folder.
        split: ``train``, ``validation`` (``valid``), ``test`` or ``all``.
        max_tokens: only the first so many tokens of each corpus.
        window: longest input; ``None`` is the run's ``sequence_length``.
        stride: see ``evaluate_perplexity``.
        batch_size: windows run through the model at once.
        progress: told of the tokens done.

    Raises:
        DataError: the run's token files are missing or damaged, or the split is empty.
        ConfigError: the run's config is broken, or an option is out of range.
    """
    from mtnlg.training.saved_run import load_run

    config = load_run(Path(run_dir))
    return evaluate_perplexity(
        model,
        tokenizer,
        texts_of_run(config, tokenizer, split, max_tokens),
        window=config.data.sequence_length if window is None else window,
        stride=stride,
        batch_size=batch_size,
        reset_at_document_boundaries=config.data.reset_at_document_boundaries,
        progress=progress,
    )


def evaluate_files(
    model: MegatronLmDecoder,
    tokenizer: Tokenizer,
    paths: Sequence[str],
    *,
    text_key: str = "text",
    encoding_errors: str = "strict",
    max_tokens: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress = no_progress,
) -> PerplexityResult:
    """Evaluate on text, JSON Lines or Parquet files.

    Args:
        model: the decoder.
        tokenizer: the model's.
        paths: files, folders or glob patterns.
        text_key: the field that holds the text.
        encoding_errors: what to do about bytes that are not UTF-8; see ``read_documents``.
        max_tokens: only the first so many tokens.
        window: longest input; ``None`` is the model's ``max_position_embeddings``.
        stride: see ``evaluate_perplexity``.
        batch_size: windows run through the model at once.
        progress: told of the tokens done.

    Raises:
        DataError: a file is missing, broken or empty.
        ConfigError: an option is out of range.
    """
    texts = texts_of_files(
        paths, tokenizer, text_key=text_key, encoding_errors=encoding_errors, max_tokens=max_tokens
    )
    return evaluate_perplexity(
        model, tokenizer, texts, window=window, stride=stride, batch_size=batch_size, progress=progress
    )


def evaluate_perplexity(
    model: MegatronLmDecoder,
    tokenizer: Tokenizer,
    texts: Iterable[EvaluationText],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = BATCH_SIZE,
    reset_at_document_boundaries: bool = False,
    progress: Progress = no_progress,
) -> PerplexityResult:
    """Evaluate on texts, every token predicted once.

    The documents of a text are joined, each ended by the end-of-text token, and the first token is
    predicted from that token alone. The joined text is cut into windows; see ``stride``.

    Args:
        model: the decoder; put into evaluation mode for the time being.
        tokenizer: the model's.
        texts: the sources.
        window: longest input in tokens; ``None`` is the model's ``max_position_embeddings``.
        stride: tokens between the beginnings of windows. ``None`` sets them side by side, as training
            reads; smaller values give tokens at the beginning of a window more context and a better
            score, at ``window / stride`` times the work.
        batch_size: windows run through the model at once.
        reset_at_document_boundaries: attention and positions start anew at each document, for models
            trained so.
        progress: told of the tokens done.

    Raises:
        DataError: there is nothing to predict.
        ConfigError: ``window``, ``stride`` or ``batch_size`` is out of range.
    """
    if next(model.parameters()).is_meta:
        raise ConfigError("the model is on the meta device and has no weights to evaluate.")
    longest = model.config.max_position_embeddings
    window = longest if window is None else window
    stride = window if stride is None else stride
    _check_options(window, stride, batch_size, longest)
    began = time.monotonic()
    end = tokenizer.end_of_text_id
    scorer = _Scorer(model, batch_size, end if reset_at_document_boundaries else None, progress)
    sources: dict[str, Score] = {}
    for text in texts:
        name = text.name
        while name in sources:  # two corpora of the same name
            name += "'"
        score = scorer.score(text, cut_from=end, window=window, stride=stride)
        if score.num_tokens:
            sources[name] = score
    if not sources:
        raise DataError("there is nothing to evaluate on: the texts hold no token.")
    return PerplexityResult(sources, window, stride, time.monotonic() - began)


def _check_options(window: int, stride: int, batch_size: int, longest: int) -> None:
    problems = []
    if not 1 <= window <= longest:
        problems.append(f"window is {window}: it must be 1 to {longest} (max_position_embeddings).")
    if not 1 <= stride <= max(window, 1):
        problems.append(f"stride is {stride}: it must be 1 to window ({window}).")
    if batch_size < 1:
        problems.append(f"batch_size is {batch_size}: it must be at least 1.")
    if problems:
        raise ConfigError(problems)


class _Scorer:
    """Runs windows through the model in batches and adds up."""

    def __init__(
        self, model: MegatronLmDecoder, batch_size: int, reset_after: int | None, progress: Progress
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.reset_after, self.progress = reset_after, progress
        self.device = next(model.parameters()).device

    def score(self, text: EvaluationText, cut_from: int, window: int, stride: int) -> Score:
        score = Score()

        def counted() -> Iterator[np.ndarray]:
            for document in text.documents:
                score.num_documents += 1
                score.num_bytes += document.num_bytes
                score.num_characters += document.num_characters
                yield document.ids

        was_training = self.model.training
        self.model.eval()
        try:
            for rows in _in_batches(cut_windows(counted(), cut_from, window, stride), self.batch_size):
                score.nll += self._run(rows)
                score.num_tokens += sum(row.num_scored for row in rows)
                self.progress(f"evaluating {text.name}", score.num_tokens, text.num_tokens, "tokens")
        finally:
            self.model.train(was_training)
        return score

    @torch.inference_mode()
    def _run(self, rows: list[Window]) -> float:
        largest = max(int(row.ids.max()) for row in rows)
        if largest >= self.model.config.vocab_size:
            raise DataError(
                f"the text holds token {largest}, and the model's vocabulary has only 0 to "
                f"{self.model.config.vocab_size - 1}: it was made with another tokenizer."
            )
        batch = make_batch(rows, self.reset_after).to(self.device)
        output = self.model(
            batch.input_ids, batch.labels, position_ids=batch.position_ids, document_ids=batch.document_ids
        )
        assert output.loss is not None
        return float(output.loss)


def _in_batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    rows: list[Window] = []
    for window in windows:
        rows.append(window)
        if len(rows) == size:
            yield rows
            rows = []
    if rows:
        yield rows
