"""The tokenizer of T5 and mT5: SentencePiece, with an end token after every text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from torch import LongTensor, Tensor

from mtnlg.config.errors import ConfigError, DataError
from mtnlg.tokens.sentencepiece_file import FILE_NAME as SENTENCEPIECE_NAME
from mtnlg.tokens.sentencepiece_file import definition_of, read_sentencepiece
from mtnlg.tokens.settings_files import read_settings
from mtnlg.tokens.tokenizer import FILE_NAME, Tokenizer

DEFAULTS: dict[str, Any] = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
EXTRA_IDS = 100  # sentinels, where the folder does not say


class T5Tokenizer(Tokenizer):
    """Text to token ids and back, as transformers' ``T5Tokenizer`` and ``MT5Tokenizer`` do it.

    Made by ``T5Tokenizer.from_pretrained`` out of a folder's ``tokenizer.json`` or ``spiece.model``; no
    SentencePiece library is needed.
    """

    ends_texts = True

    @classmethod
    def from_pretrained(cls, path: str | Path) -> T5Tokenizer:
        """Load a folder with a ``tokenizer.json`` or a ``spiece.model``, or one of these files.

        Raises:
            DataError: neither is there, or it is damaged; the message names it.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        model = path if path.suffix == ".model" else folder / SENTENCEPIECE_NAME
        if path.suffix != ".model" and (folder / FILE_NAME).is_file():
            plain = Tokenizer.from_pretrained(folder)
            return cls(plain.definition, {**DEFAULTS, **plain.settings}, str(folder / FILE_NAME))
        if not model.is_file():
            raise DataError(
                f"{path} is not a tokenizer: neither {FILE_NAME} nor {SENTENCEPIECE_NAME} is in {folder}."
            )
        try:
            settings = {**DEFAULTS, **read_settings(folder)}
        except ValueError as error:
            raise DataError(f"{folder}: the tokenizer's files are damaged: {error}") from error
        definition = definition_of(read_sentencepiece(model), int(settings.get("extra_ids", EXTRA_IDS)))
        return cls(definition, settings, str(model))

    @overload
    def encode(self, text: str, return_tensors: None = None, allow_special: bool = True) -> list[int]: ...
    @overload
    def encode(
        self, text: str, return_tensors: Literal["pt"], allow_special: bool = True
    ) -> LongTensor: ...
    def encode(
        self, text: str, return_tensors: Literal["pt"] | None = None, allow_special: bool = True
    ) -> list[int] | LongTensor:
        """Token ids of ``text`` and the end token.

        Args:
            text: any Unicode text.
            return_tensors: ``"pt"`` for a LongTensor ``[1, tokens]`` instead of a list.
            allow_special: read ``<extra_id_0>`` and the like as those tokens.

        Raises:
            DataError: ``text`` holds half of a surrogate pair, which is no Unicode character.
        """
        ids = [*super().encode(text, allow_special=allow_special), self.end_of_text_id]
        if return_tensors is None:
            return ids
        if return_tensors != "pt":
            raise ConfigError(f"return_tensors is {return_tensors!r}: give 'pt' or None.")
        import torch

        return torch.tensor([ids], dtype=torch.long)  # type: ignore[return-value]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text and the end token."""
        return [[*ids, self.end_of_text_id] for ids in super().encode_batch(texts)]

    def __call__(self, texts: str | Sequence[str]) -> dict[str, Tensor]:
        """Token ids of one text or several as tensors, the shorter ones filled up.

        Returns:
            ``input_ids`` and ``attention_mask``, LongTensors [texts, tokens of the longest].
        """
        import torch

        rows = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        longest = max(map(len, rows), default=0)
        ids = [row + [self.padding_id] * (longest - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
