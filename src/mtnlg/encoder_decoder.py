"""The encoder-decoders that people import: T5, mT5, UMT5 and our own, with text, files and generation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.generation.answers import answer
from mtnlg.generation.keeper import EngineKeeper
from mtnlg.interop import fetch_from_hub, looks_like_hub_name, write_hugging_face
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES
from mtnlg.model import MegatronEncoderDecoder, initialize_weights
from mtnlg.pretrained import Pretrained, Quantize
from mtnlg.quantization import quantize_model
from mtnlg.tokens import Tokenizer
from mtnlg.tokens import t5_tokenizer as t5

if TYPE_CHECKING:
    from mtnlg.training.model_files import ModelFiles


class MegatronEncoderDecoderModel(Pretrained, MegatronEncoderDecoder):
    """An encoder-decoder: an ``nn.Module`` that also reads, writes and generates.

    ``model(ids, decoder_input_ids).logits`` is [batch, target, vocab]; ``model(ids, labels=labels).loss``
    is the *sum* of the cross entropies, to be divided by the number of labels that are not ``-100``. Under
    ``torch.device("meta")`` the model has shapes only.

    Args:
        config: the architecture.
        tokenizer: turns text into ids for :meth:`generate`; may be set later.
        seed: of the initialisation.

    Raises:
        ConfigError: the config is a decoder's.
    """

    def __init__(
        self, config: MegatronModelConfig, tokenizer: Tokenizer | None = None, seed: int = 1234
    ) -> None:
        if config.architecture != "encoder_decoder":
            raise ConfigError(
                f"architecture is {config.architecture!r}: MegatronLmModel is the class of decoders."
            )
        super().__init__(config)
        self.tokenizer = tokenizer
        self.engine_config = None
        self._engine_keeper = EngineKeeper()
        if not self.is_meta:
            initialize_weights(self, config, seed)
        if config.quantize:
            quantize_model(self, QuantizeConfig.from_dict(config.quantize_config))

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Quantize = None,
    ) -> Self:
        """A trained model, with its tokenizer where one lies beside it, in evaluation mode.

        Args:
            name_or_path: the folder of a run, one checkpoint, a Hugging Face folder (T5, mT5, UMT5), or a
                name on the Hugging Face hub.
            device: where to put the weights.
            dtype: convert the weights to it; ``None`` keeps how they were saved.
            quantize: round the matrices to few bits, as :class:`~mtnlg.api.MegatronLmModel` does.

        Raises:
            ConfigError: the model there is a decoder.
            CheckpointError: nothing loadable is there; the message says what was looked for.
        """
        from mtnlg.training.model_files import open_model_files

        return cls.from_files(open_model_files(name_or_path), str(name_or_path), device, dtype, quantize)

    @classmethod
    def from_files(
        cls,
        files: ModelFiles,
        where: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Quantize = None,
    ) -> Self:
        """See :meth:`~mtnlg.pretrained.Pretrained.from_files`."""
        if files.config.architecture != "encoder_decoder":
            raise ConfigError(f"{where} is a decoder: open it with MegatronLmModel.from_pretrained.")
        return super().from_files(files, where, device, dtype, quantize)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write a Hugging Face folder that transformers and :meth:`from_pretrained` load.

        Args:
            path: the folder; weights of an earlier save there are replaced.
            dtype: of the saved weights; ``None`` keeps the model's.
            max_shard_bytes: largest weight file.

        Raises:
            ConfigError: no Hugging Face architecture computes this model; the fields are named.
            CheckpointError: the disk refused.
        """
        self._check_no_adapter()
        write_hugging_face(self, Path(path), dtype=dtype, max_shard_bytes=max_shard_bytes)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(path))

    # -- generation

    def generate(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Read a text, or ids, and write another: text in, text out; ids in, ids out.

        Ids come out as transformers gives them: the token that a decoder starts with, then what was
        written, ``eos_token_id`` included; shorter rows of a tensor are filled up. ``max_length`` counts
        all of that, and nothing of what was read; 64 tokens are written if no length is given. Without any
        option of chance the most likely token is always taken; ``num_beams`` searches.

        Args:
            input_ids: a text, texts, one sequence of ids, several, or a LongTensor [tokens] or [batch,
                tokens], in which ``pad_token_id`` at the ends of a row is no part of it.
            attention_mask: [batch, tokens], nonzero where a row of the tensor has a token.
            **options: see :class:`~mtnlg.generation.options.GenerationOptions` and, for what changes the
                kind of the result, :class:`~mtnlg.generation.options.DetailedOptions`.

        Raises:
            ConfigError: an option is out of range, or there is text and no tokenizer; all that is wrong is
                named.
        """
        if attention_mask is not None:
            is_missing = torch.as_tensor(attention_mask) == 0
            input_ids = torch.as_tensor(input_ids).masked_fill(is_missing, self.config.pad_token_id)
        return answer(self, self.tokenizer, self._engine_keeper, self.engine_config, input_ids, options)


class T5ForConditionalGeneration(MegatronEncoderDecoderModel):
    """T5, T5 v1.1, UL2 and Flan-T5 under the name they have in transformers."""


class MT5ForConditionalGeneration(MegatronEncoderDecoderModel):
    """mT5 under the name it has in transformers."""


class UMT5ForConditionalGeneration(MegatronEncoderDecoderModel):
    """UMT5 under the name it has in transformers."""


class T5Tokenizer(t5.T5Tokenizer):
    """T5's tokenizer, out of a folder or by its name on the Hugging Face hub."""

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Load a folder with a ``tokenizer.json`` or a ``spiece.model``, or a name on the hub.

        Raises:
            DataError: neither file is there, or it is damaged; the message names it.
            CheckpointError: the hub gave nothing; the message says how to get the files by hand.
        """
        folder = Path(path)
        if not folder.exists() and isinstance(path, str) and looks_like_hub_name(path):
            folder = fetch_from_hub(path)
        return super().from_pretrained(folder)  # type: ignore[return-value]


class MT5Tokenizer(T5Tokenizer):
    """mT5's tokenizer under the name it has in transformers."""
