"""What the models that people import have in common: weights out of files, adapters, engines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.config.adapter import AdapterConfig
from mtnlg.config.quantize import QuantizeConfig, with_quantization
from mtnlg.generation import Engine
from mtnlg.interop.adapter import Adapter, adapter_of, load_adapter
from mtnlg.interop.fingerprint import check_base, fingerprint_of
from mtnlg.interop.peft import read_adapter, write_adapter
from mtnlg.model import LanguageModel, MegatronLmDecoder, NoInitialization
from mtnlg.model.adapters import merge_low_rank, put_adapter, start_adapter, take_out_adapter
from mtnlg.quantization import codes_of_weights, converted, num_quantized
from mtnlg.tokens import Tokenizer

if TYPE_CHECKING:
    from mtnlg.config.generation import EngineConfig
    from mtnlg.training.model_files import ModelFiles

Quantize = bool | Mapping[str, Any] | QuantizeConfig | None


class Pretrained(nn.Module):
    """Beside a :class:`~mtnlg.model.MegatronLmDecoder` or an encoder-decoder, whose parts it handles."""

    config: MegatronModelConfig
    adapter: AdapterConfig | None
    tokenizer: Tokenizer | None
    engine_config: EngineConfig | None  # of ``generate``; ``None`` is the defaults
    draft_model: MegatronLmDecoder | None = None  # guesses, where ``engine_config`` says so

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

    @property
    def _plain(self) -> MegatronLmDecoder:
        return cast(MegatronLmDecoder, self)  # what is done to a decoder is done to both kinds

    # -- files

    @classmethod
    def from_files(
        cls,
        files: ModelFiles,
        where: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Quantize = None,
    ) -> Self:
        """The model of what ``open_model_files`` found, in evaluation mode.

        Args:
            files: may be those of an adapter, which is put in.
            where: named in errors.
            device: where to put the weights.
            dtype: convert the weights to it; ``None`` keeps how they were saved.
            quantize: see ``from_pretrained``.

        Raises:
            ConfigError: ``quantize`` says what there is not, or the class is that of other models.
            CheckpointError: weights are missing, left over, or of other shapes.
        """
        plain = files.base or files
        with torch.device("meta"), NoInitialization():
            model = cls(with_quantization(plain.config, quantize))  # type: ignore[call-arg, arg-type]
        weights = {name: converted(name, one, device, dtype) for name, one in plain.stream(None)}
        if plain.config.tie_word_embeddings:
            weights["head.output.weight"] = weights["embedding.tokens.weight"]
        weights = codes_of_weights(model, weights)
        check_weights(model._plain, weights, where)
        model.load_state_dict(weights, assign=True)
        model._plain.tie_weights()
        model.tokenizer = files.tokenizer
        if files.adapter is not None:
            check_base(files.adapter.base_fingerprint, fingerprint_of(model._plain), where)
            load_adapter(model._plain, files.adapter)
        return model.eval()

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
        check_base(adapter.base_fingerprint, fingerprint_of(self._plain), where)
        load_adapter(self._plain, adapter)

    def save_adapter(self, path: str | os.PathLike[str], *, base: str | None = None) -> None:
        """Write the adapter alone, as a folder that PEFT, :meth:`add_adapter` and the server load.

        Args:
            path: the folder.
            base: name or path of the base, which ``from_pretrained`` of the folder looks for.

        Raises:
            ConfigError: there is no adapter.
            CheckpointError: the disk refused.
        """
        found = adapter_of(self._plain, fingerprint_of(self._plain))
        write_adapter(Path(path), found, self.config, base)

    def merge_adapter(self) -> None:
        """Make LoRA's updates part of the weights: the model computes the same, without an adapter.

        Raises:
            ConfigError: the adapter has virtual tokens, or the weights below it are quantized.
        """
        merge_low_rank(self._plain)

    def remove_adapter(self) -> None:
        """Leave the base as it was."""
        take_out_adapter(self._plain)

    def _put_adapter(self, config: AdapterConfig, seed: int) -> None:
        text_ids: list[int] = []
        if config.init_text and not self.is_meta:
            if self.tokenizer is None:
                raise ConfigError(
                    f"the virtual tokens are to begin as {config.init_text!r}, which takes a tokenizer: "
                    f"give {type(self).__name__} one, or leave init_text empty."
                )
            text_ids = self.tokenizer.encode(config.init_text)
        put_adapter(self._plain, config)
        if not self.is_meta:
            start_adapter(self._plain, seed, text_ids)

    def _check_no_adapter(self) -> None:
        """Raise ConfigError where an adapter would not be saved with the model."""
        if self.adapter is not None:
            raise ConfigError(
                "the model has an adapter: merge_adapter() makes it part of the weights (lora), "
                "save_adapter() writes it by itself."
            )

    # -- generation

    def make_engine(self, config: EngineConfig | None = None) -> Engine:
        """An engine of your own over this model, for many requests at once, streams and embeddings.

        Args:
            config: settings; ``None`` is ``engine_config``.

        Raises:
            ConfigError: the settings do not fit the model or the machine.
        """
        decode = None if self.tokenizer is None else self.tokenizer.decode
        return Engine(self._plain, decode, config or self.engine_config, draft_model=self.draft_model)


def check_weights(model: LanguageModel, weights: Mapping[str, Tensor], where: str) -> None:
    """Say in plain words what does not fit, before torch says it in its own.

    Raises:
        CheckpointError: naming tensors that are missing, left over, or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    problems += [f"{name} is not the model's" for name in weights.keys() - expected.keys()]
    problems += [
        f"{name} has the shape {list(weights[name].shape)}, the model's is {list(shape)}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6])
        raise CheckpointError(f"{where}: the weights do not fit the config: {shown}.")
