"""Prompts as people give them: a text, texts, ids, rows of ids, a tensor; and answers of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from mtnlg.config import ConfigError, DataError, MegatronModelConfig
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.tokenizer import END_OF_TEXT

Prompt: TypeAlias = "str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor"


@dataclass
class Prompts:
    """What was given, as rows of ids.

    Args:
        given: as it was.
        rows: ids of each prompt.
        texts: each prompt's text, where text was given.
        is_single: one prompt was given and not a list with one in it.
        padding_id: fills up rows; ``None`` is the tokenizer's.
    """

    given: Prompt
    rows: list[list[int]]
    texts: list[str] | None = None
    is_single: bool = False
    padding_id: int | None = None

    @classmethod
    def read(cls, prompt: Prompt, tokenizer: Tokenizer | None) -> Prompts:
        """Take a prompt of any kind.

        Raises:
            ConfigError: it is none, or it is text and there is no tokenizer.
        """
        if isinstance(prompt, Tensor):
            if prompt.is_floating_point() or prompt.dim() not in (1, 2):
                raise ConfigError(
                    f"a prompt tensor holds ids [tokens] or [batch, tokens], not {prompt.dtype} "
                    f"{list(prompt.shape)}."
                )
            is_single = prompt.dim() == 1
            return cls(prompt, [prompt.tolist()] if is_single else prompt.tolist(), None, is_single)
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], str)):
            if tokenizer is None:
                raise ConfigError("the model has no tokenizer: set model.tokenizer, or give token ids.")
            texts = [prompt] if isinstance(prompt, str) else list(cast("Sequence[str]", prompt))
            rows = [tokenizer.encode(text) for text in texts]
            return cls(prompt, rows, texts, isinstance(prompt, str))
        if prompt and isinstance(prompt[0], Sequence):
            return cls(prompt, [list(row) for row in cast("Sequence[Sequence[int]]", prompt)])
        return cls(prompt, [list(cast("Sequence[int]", prompt))], None, True)

    def as_sources(self, config: MegatronModelConfig) -> Prompts:
        """The same as an encoder-decoder reads them: no part of the answer.

        A text ends as T5's texts do, with ``eos_token_id``; what only fills up a tensor's rows is left out.
        """
        rows, end, filler = self.rows, config.eos_token_id, config.pad_token_id
        if self.texts is not None:
            rows = [row if row[-1:] == [end] else [*row, end] for row in rows]
        elif isinstance(self.given, Tensor):
            rows = [_without_ends(row, filler) for row in rows]
        texts = None if self.texts is None else [""] * len(self.texts)
        return Prompts(self.given, rows, texts, self.is_single, filler)

    def as_given(self, answers: list[Any], tokenizer: Tokenizer | None) -> Any:
        """Answers in the form of the prompts: lists for lists, a tensor for a tensor.

        Args:
            answers: for each prompt, a text, ids, or a list of several such.
            tokenizer: knows the padding.
        """
        if isinstance(self.given, Tensor) and answers and isinstance(answers[0][0], int):
            longest = max(len(row) for row in answers)
            filler = self.padding_id
            if filler is None:
                filler = tokenizer.padding_id if tokenizer is not None else 0
            filled = [row + [filler] * (longest - len(row)) for row in answers]
            tensor = torch.tensor(filled, dtype=torch.long, device=self.given.device)
            return tensor[0] if self.is_single else tensor
        return answers[0] if self.is_single else answers


def _without_ends(row: list[int], filler: int) -> list[int]:
    """A row without what fills it up on either side; at least one token stays."""
    begin, end = 0, len(row)
    while end - begin > 1 and row[end - 1] == filler:
        end -= 1
    while end - begin > 1 and row[begin] == filler:
        begin += 1
    return row[begin:end]


def start_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The token that begins a document: what the tokenizer names, or the end of the one before."""
    named = tokenizer.settings.get("bos_token", END_OF_TEXT)
    name = named.get("content") if isinstance(named, dict) else named
    start = tokenizer.special_tokens.get(str(name))
    return [] if start is None or start >= vocab_size else [start]


def end_id(tokenizer: Tokenizer | None) -> int | None:
    """The token that ends a text, where there is a tokenizer that names one."""
    try:
        return None if tokenizer is None else tokenizer.end_of_text_id
    except DataError:  # a foreign tokenizer need not name one
        return None
