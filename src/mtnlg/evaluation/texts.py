"""What to evaluate on: a split of a run's data, or files, as documents of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtnlg.config import ConfigError, DataError, RunConfig
from mtnlg.tokens import Tokenizer, read_documents
from mtnlg.tokens.split import split_name
from mtnlg.tokens.token_corpus import TokenCorpus


@dataclass(frozen=True)
class EvaluationDocument:
    """One document.

    Args:
        ids: [tokens], its end-of-text token included.
        num_bytes: of its text in UTF-8, special tokens counting nothing.
        num_characters: of its text (Unicode code points).
    """

    ids: np.ndarray
    num_bytes: int
    num_characters: int


@dataclass(frozen=True)
class EvaluationText:
    """One source of documents.

    Args:
        name: what to call it in the result.
        documents: read once.
        num_tokens: in all, where that is known beforehand.
    """

    name: str
    documents: Iterable[EvaluationDocument]
    num_tokens: int | None = None


def texts_of_run(
    config: RunConfig, tokenizer: Tokenizer, split: str = "validation", max_tokens: int | None = None
) -> list[EvaluationText]:
    """One split of every corpus of a run, document by document in the order of the files.

    Args:
        config: of the run, its token files in ``data.blend``.
        tokenizer: that made them.
        split: ``train``, ``validation`` (``valid``), ``test`` or ``all``.
        max_tokens: only the first so many tokens of each corpus.

    Raises:
        DataError: a token file is missing or damaged, or the split is empty.
        ConfigError: there is no such split.
    """
    try:
        split = split_name(split)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not config.data.blend:
        raise DataError("the run's config names no token files (data.blend): train it first.")
    shares = config.data.split_shares()
    texts = []
    for entry in config.data.blend:
        corpus = TokenCorpus(entry.path, config.model.vocab_size)
        part = corpus.part(shares, split)
        pieces = _pieces(corpus.tokens, np.asarray(part.begins).tolist(), np.asarray(part.lengths).tolist())
        documents = (_decoded(ids, tokenizer) for ids in _first_tokens(pieces, max_tokens))
        count = part.num_tokens if max_tokens is None else min(max_tokens, part.num_tokens)
        texts.append(EvaluationText(corpus.name, documents, count))
    if not any(text.num_tokens for text in texts):
        raise DataError(
            f"the {split} split is empty (data.split is {config.data.split!r}): choose another."
        )
    return texts


def texts_of_files(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    encoding_errors: str = "strict",
    max_tokens: int | None = None,
) -> list[EvaluationText]:
    """Text, JSON Lines or Parquet files, tokenized as training tokenizes them.

    Args:
        paths: files, folders or glob patterns.
        tokenizer: of the model.
        text_key: the field of JSON Lines or Parquet that holds the text.
        encoding_errors: what to do about bytes that are not UTF-8; see ``read_documents``.
        max_tokens: only the first so many tokens.
    """
    encoded = (
        np.array([*tokenizer.encode(document.text), tokenizer.end_of_text_id], dtype=np.int64)
        for document in read_documents(list(paths), text_key=text_key, encoding_errors=encoding_errors)
    )
    documents = (_decoded(ids, tokenizer) for ids in _first_tokens(encoded, max_tokens))
    name = Path(paths[0]).name if len(paths) == 1 else f"{len(paths)} sources"
    return [EvaluationText(name, documents)]


def _decoded(ids: np.ndarray, tokenizer: Tokenizer) -> EvaluationDocument:
    text = tokenizer.decode(ids.tolist())
    return EvaluationDocument(ids, len(text.encode("utf-8")), len(text))


def _pieces(tokens: np.ndarray, begins: Sequence[int], lengths: Iterable[int]) -> Iterator[np.ndarray]:
    return (tokens[begin : begin + length] for begin, length in zip(begins, lengths))


def _first_tokens(pieces: Iterable[np.ndarray], max_tokens: int | None) -> Iterator[np.ndarray]:
    """``pieces`` up to ``max_tokens`` tokens in all, the last one cut."""
    left = max_tokens
    for ids in pieces:
        if left is not None:
            ids = ids[:left]
            left -= len(ids)
        yield ids
        if left == 0:
            return
