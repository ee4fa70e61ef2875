"""The model that people import: the plain decoder with text, files and generation around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import torch
from torch import Tensor

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.config.prompt_tuning import prompt_adapter
from mtnlg.config.quantize import QuantizeConfig
from mtnlg.encoder_decoder import MegatronEncoderDecoderModel
from mtnlg.generation.answers import answer
from mtnlg.generation.keeper import EngineKeeper
from mtnlg.generation.options import DetailedOptions, GenerationOptions
from mtnlg.generation.prompts import Prompt, end_id
from mtnlg.interop import write_hugging_face
from mtnlg.interop.quantized_writing import write_quantized
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.pretrained import Pretrained, Quantize
from mtnlg.quantization import (
    quantize_model,
    quantized_linears,
)
from mtnlg.tokens import Tokenizer

if TYPE_CHECKING:
    from mtnlg.config.generation import EngineConfig
    from mtnlg.generation.runner import Runner


class MegatronLmModel(Pretrained, MegatronLmDecoder):
    """A decoder language model: an ``nn.Module`` that also reads, writes and generates.

    ``model(ids).logits`` is [batch, sequence, vocab]. The weights start with Megatron's
    initialisation; under ``torch.device("meta")`` the model has shapes only.

    Args:
        config: the architecture.
        tokenizer: turns text into ids for :meth:`generate`; may be set later.
        seed: of the initialisation.
    """

    def __init__(
        self, config: MegatronModelConfig, tokenizer: Tokenizer | None = None, seed: int = 1234
    ) -> None:
        if config.architecture != "decoder":
            raise ConfigError(f"architecture is {config.architecture!r}: use MegatronEncoderDecoderModel.")
        super().__init__(config)
        self.tokenizer = tokenizer
        # What engines run a model with whose weights are on other ranks; ``None``: they are here.
        self.make_runner: Callable[[EngineConfig], Runner] | None = None
        self.read_fingerprint: Callable[[], str] | None = None  # of weights that are not here
        self.engine_config = None
        self._engine_keeper = EngineKeeper()
        if not self.is_meta:
            initialize_weights(self, config, seed)
        if config.quantize:
            quantize_model(self, QuantizeConfig.from_dict(config.quantize_config))
        prompt = prompt_adapter(config)
        if prompt is not None:
            self._put_adapter(prompt, seed)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "draft_model":  # a companion and no part of this model: neither counted nor saved
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Quantize = None,
    ) -> MegatronLmModel:
        """A trained model with its tokenizer, in evaluation mode.

        An encoder-decoder comes as :class:`~mtnlg.encoder_decoder.MegatronEncoderDecoderModel`.

        Args:
            name_or_path: the folder of a run (its newest whole checkpoint), one checkpoint, a Hugging
                Face folder (GPT-2, Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE, GLM-4-MoE), a name on the
                Hugging Face hub, or an adapter's folder, which names its base.
            device: where to put the weights.
            dtype: convert the weights to it; ``None`` keeps how they were saved.
            quantize: round the matrices to few bits: ``True``, or the fields of a
                :class:`~mtnlg.config.quantize.QuantizeConfig`; ``None`` does as the model's config says.

        Raises:
            ConfigError: ``quantize`` says what there is not.
            CheckpointError: nothing loadable is there; the message says what was looked for.
        """
        from mtnlg.training.model_files import open_model_files

        files = open_model_files(name_or_path)
        if files.config.architecture == "encoder_decoder":
            options = (str(name_or_path), device, dtype, quantize)
            return cast(MegatronLmModel, MegatronEncoderDecoderModel.from_files(files, *options))
        return cls.from_files(files, str(name_or_path), device, dtype, quantize)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write a Hugging Face folder that transformers, vLLM and :meth:`from_pretrained` load.

        A quantized model is written as compressed-tensors, where its family can be, or else in a form of
        our own that :meth:`from_pretrained` alone reads (:mod:`mtnlg.interop.quantized_writing`).

        Args:
            path: the folder; weights of an earlier save there are replaced.
            dtype: of the saved weights; ``None`` keeps the model's.
            max_shard_bytes: largest weight file.

        Raises:
            ConfigError: no Hugging Face architecture computes this model; the fields are named.
            CheckpointError: the disk refused.
        """
        self._check_no_adapter()
        tokenizer = self.tokenizer
        write = write_quantized if quantized_linears(self) else write_hugging_face
        write(
            self,
            Path(path),
            end_of_text_id=end_id(tokenizer),
            padding_id=None if tokenizer is None else tokenizer.special_tokens.get("<|padding|>"),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(path))

    # -- generation

    @overload
    def generate(self, prompt: str, **options: Unpack[GenerationOptions]) -> str: ...
    @overload
    def generate(self, prompt: Tensor, **options: Unpack[GenerationOptions]) -> Tensor: ...
    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], **options: Unpack[GenerationOptions]
    ) -> list[str]: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Unpack[GenerationOptions]) -> list[int]: ...
    @overload
    def generate(
        self, prompt: Sequence[Sequence[int]], **options: Unpack[GenerationOptions]
    ) -> list[list[int]]: ...
    @overload
    def generate(self, prompt: Prompt, **options: Unpack[DetailedOptions]) -> Any: ...
    def generate(self, prompt: Any, **options: Any) -> Any:
        """Continue a prompt: text in, text out; ids in, ids out. The result begins with the prompt.

        Without any option of chance (``temperature``, ``top_k``, ``top_p``, ``min_p``, ``typical_p``,
        ``seed``) the most likely token is always taken; with any of them tokens are drawn at random.
        Generation never goes past the model's ``max_position_embeddings``.

        The first call makes an engine (``engine_config``), later ones use it: prompts that begin as
        earlier ones did are not computed again. Changed weights are noticed.

        Args:
            prompt: a text, texts, one sequence of ids, several (of any lengths), or a LongTensor
                [tokens] or [batch, tokens]. A tensor gives a tensor, shorter rows padded.
            **options: see :class:`~mtnlg.generation.options.GenerationOptions` and, for what changes
                the kind of the result, :class:`~mtnlg.generation.options.DetailedOptions`.

        Raises:
            ConfigError: an option is out of range, the prompt leaves no room, or there is text and no
                tokenizer; all that is wrong is named.
        """
        return answer(
            self, self.tokenizer, self._engine_keeper, self.engine_config, prompt, options, self.draft_model
        )
