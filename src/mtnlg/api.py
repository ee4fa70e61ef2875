"""The model that people import: the plain decoder with text, files and generation around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast, overload

import torch
from torch import Tensor

from mtnlg.config import ConfigError, MegatronModelConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.prompt_tuning import prompt_adapter
from mtnlg.config.quantize import QuantizeConfig, with_quantization
from mtnlg.encoder_decoder import MegatronEncoderDecoderModel, check_weights
from mtnlg.generation import Engine
from mtnlg.generation.answers import answer
from mtnlg.generation.keeper import EngineKeeper
from mtnlg.generation.options import DetailedOptions, GenerationOptions
from mtnlg.generation.prompts import Prompt, end_id
from mtnlg.interop import write_hugging_face
from mtnlg.interop.adapter import Adapter, adapter_of, load_adapter
from mtnlg.interop.fingerprint import check_base, fingerprint_of
from mtnlg.interop.peft import read_adapter, write_adapter
from mtnlg.interop.quantized import write_quantized
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES
from mtnlg.model import MegatronLmDecoder, NoInitialization, initialize_weights
from mtnlg.model.adapters import merge_low_rank, put_adapter, start_adapter, take_out_adapter
from mtnlg.quantization import (
    codes_of_weights,
    converted,
    num_quantized,
    quantize_model,
    quantized_linears,
)
from mtnlg.tokens import Tokenizer

if TYPE_CHECKING:
    from mtnlg.config.generation import EngineConfig
    from mtnlg.generation.runner import Runner


class MegatronLmModel(MegatronLmDecoder):
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
        self.engine_config: EngineConfig | None = None  # of :meth:`generate`; ``None`` is the defaults
        self.draft_model: MegatronLmDecoder | None = None  # guesses, where ``engine_config`` says so
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

    @property
    def is_meta(self) -> bool:
        """Whether the model has shapes only."""
        return next(self.parameters()).is_meta

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, those of quantized matrices too; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters()) + num_quantized(self)

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quantize: bool | Mapping[str, Any] | QuantizeConfig | None = None,
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
        plain = files.base or files
        with torch.device("meta"), NoInitialization():
            model = cls(with_quantization(plain.config, quantize))
        weights = {name: converted(name, one, device, dtype) for name, one in plain.stream(None)}
        if plain.config.tie_word_embeddings:
            weights["head.output.weight"] = weights["embedding.tokens.weight"]
        weights = codes_of_weights(model, weights)
        check_weights(model, weights, str(name_or_path))
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.tokenizer = files.tokenizer
        if files.adapter is not None:
            check_base(files.adapter.base_fingerprint, fingerprint_of(model), str(name_or_path))
            load_adapter(model, files.adapter)
        return model.eval()

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write a Hugging Face folder that transformers, vLLM and :meth:`from_pretrained` load.

        A quantized model is written as compressed-tensors, where its family can be, or else in a form of
        our own that :meth:`from_pretrained` alone reads (:mod:`mtnlg.interop.quantized`).

        Args:
            path: the folder; weights of an earlier save there are replaced.
            dtype: of the saved weights; ``None`` keeps the model's.
            max_shard_bytes: largest weight file.

        Raises:
            ConfigError: no Hugging Face architecture computes this model; the fields are named.
            CheckpointError: the disk refused.
        """
        if self.adapter is not None:
            raise ConfigError(
                "the model has an adapter: merge_adapter() makes it part of the weights (lora), "
                "save_adapter() writes it by itself."
            )
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

    # -- adapters

    def add_adapter(
        self, adapter: AdapterConfig | Adapter | str | os.PathLike[str], seed: int = 1234
    ) -> None:
        """Put an adapter in: it alone is trained from now on, and every call computes with it.

        Args:
            adapter: a new one, which begins by changing nothing (LoRA) or as tokens of the vocabulary
                (prompt tuning); one as a value; or an adapter's folder, as PEFT or
                :meth:`save_adapter` writes them.
            seed: of a new one's first values.

        Raises:
            ConfigError: there is one already, its layers are not in this model, or its first text needs
                a tokenizer.
            CheckpointError: its files are broken, or it was made for another model.
        """
        if self.adapter is not None:
            raise ConfigError(
                "the model has an adapter already: merge_adapter() or remove_adapter() first."
            )
        if isinstance(adapter, AdapterConfig):
            self._put_adapter(adapter, seed)
            return
        where = "the adapter"
        if not isinstance(adapter, Adapter):
            where = str(adapter)
            adapter = read_adapter(Path(adapter), self.config)
        check_base(adapter.base_fingerprint, fingerprint_of(self), where)
        load_adapter(self, adapter)

    def save_adapter(self, path: str | os.PathLike[str], *, base: str | None = None) -> None:
        """Write the adapter alone, as a folder that PEFT, :meth:`add_adapter` and the server load.

        Args:
            path: the folder.
            base: name or path of the base, which :meth:`from_pretrained` of the folder looks for.

        Raises:
            ConfigError: there is no adapter.
            CheckpointError: the disk refused.
        """
        write_adapter(Path(path), adapter_of(self, fingerprint_of(self)), self.config, base)

    def merge_adapter(self) -> None:
        """Make LoRA's updates part of the weights: the model computes the same, without an adapter.

        Raises:
            ConfigError: the adapter has virtual tokens, or the weights below it are quantized.
        """
        merge_low_rank(self)

    def remove_adapter(self) -> None:
        """Leave the base as it was."""
        take_out_adapter(self)

    def _put_adapter(self, config: AdapterConfig, seed: int) -> None:
        text_ids: list[int] = []
        if config.init_text and not self.is_meta:
            if self.tokenizer is None:
                raise ConfigError(
                    f"the virtual tokens are to begin as {config.init_text!r}, which takes a tokenizer: "
                    "give MegatronLmModel one, or leave init_text empty."
                )
            text_ids = self.tokenizer.encode(config.init_text)
        put_adapter(self, config)
        if not self.is_meta:
            start_adapter(self, seed, text_ids)

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

    def make_engine(self, config: EngineConfig | None = None) -> Engine:
        """An engine of your own over this model, for many requests at once, streams and embeddings.

        Args:
            config: settings; ``None`` is ``engine_config``.

        Raises:
            ConfigError: the settings do not fit the model or the machine.
        """
        decode = None if self.tokenizer is None else self.tokenizer.decode
        return Engine(self, decode, config or self.engine_config, draft_model=self.draft_model)
