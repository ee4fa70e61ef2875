"""The model that people import: the plain decoder with text, files and generation around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, ConfigError, DataError, MegatronModelConfig
from mtnlg.generation import (
    Continuation,
    IncrementalDecoder,
    SamplingRules,
    continuation_text,
    generate,
)
from mtnlg.interop import write_hugging_face
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES
from mtnlg.model import MegatronLmDecoder, initialize_weights
from mtnlg.tokens import Tokenizer
from mtnlg.tokens.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from mtnlg.config.generation import EngineConfig
    from mtnlg.generation.runner import Runner

Prompt: TypeAlias = "str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor"


class GenerationOptions(TypedDict, total=False):
    """Options of :meth:`MegatronLmModel.generate`, documented there."""

    max_length: int | None
    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    end_ids: Collection[int] | None
    start_of_document: bool
    use_cache: bool | None
    streamer: Callable[[Any], None] | None


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
        super().__init__(config)
        self.tokenizer = tokenizer
        # What engines run a model with whose weights are on other ranks; ``None``: they are here.
        self.make_runner: Callable[[EngineConfig], Runner] | None = None
        if not self.is_meta:
            initialize_weights(self, config, seed)

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
        """Trainable parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> MegatronLmModel:
        """A trained model with its tokenizer, in evaluation mode.

        Args:
            name_or_path: the folder of a run (its newest whole checkpoint), one checkpoint, a Hugging
                Face folder (GPT-2, Llama, Qwen2, Qwen3, Mixtral, Qwen3-MoE, GLM-4-MoE), or a name on the
                Hugging Face hub.
            device: where to put the weights.
            dtype: convert the weights to it; ``None`` keeps how they were saved.

        Raises:
            CheckpointError: nothing loadable is there; the message says what was looked for.
        """
        from mtnlg.training.model_files import open_model_files

        files = open_model_files(name_or_path)
        with torch.device("meta"):
            model = cls(files.config)
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in files.read().items()}
        _check_weights(model, weights, str(name_or_path))
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        model.tokenizer = files.tokenizer
        return model.eval()

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write a Hugging Face folder that transformers, vLLM and :meth:`from_pretrained` load.

        Args:
            path: the folder; weights of an earlier save there are replaced.
            dtype: of the saved weights; ``None`` keeps the model's.
            max_shard_bytes: largest weight file.

        Raises:
            ConfigError: no Hugging Face architecture computes this model; the fields are named.
            CheckpointError: the disk refused.
        """
        tokenizer = self.tokenizer
        write_hugging_face(
            self,
            Path(path),
            end_of_text_id=_end_id(tokenizer),
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
    def generate(
        self,
        prompt: Any,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        end_ids: Collection[int] | None = None,
        start_of_document: bool = True,
        use_cache: bool | None = None,
        streamer: Callable[[Any], None] | None = None,
    ) -> Any:
        """Continue a prompt: text in, text out; ids in, ids out. The result begins with the prompt.

        Without any of ``temperature``, ``top_k``, ``top_p`` and ``seed`` the most likely token is
        always taken; with any of them tokens are drawn at random. Generation never goes past the
        model's ``max_position_embeddings``.

        Args:
            prompt: a text, texts, one sequence of ids, several (of any lengths), or a LongTensor
                [tokens] or [batch, tokens]. A tensor gives a tensor, shorter rows padded.
            max_length: total tokens of prompt and continuation, as in transformers.
            max_new_tokens: tokens of the continuation; 64 if neither is given.
            temperature: divides the logits; 0 is greedy.
            top_k: draw from the ``top_k`` most likely tokens only.
            top_p: draw from the smallest set of likely tokens that reaches this probability.
            seed: makes the draws repeatable.
            end_ids: tokens that end a sequence; ``None`` is the tokenizer's end of text.
            start_of_document: put the token that separates documents in training before a text
                prompt, as at the beginning of one; it counts in no length. Ids stay as they are.
            use_cache: keep keys and values; ``None`` is the config's.
            streamer: for a single prompt: called with each new piece of text or each new id.

        Raises:
            ConfigError: an option is out of range, the prompt leaves no room, or there is text and no
                tokenizer.
        """
        rules = SamplingRules.from_options(temperature, top_k, top_p, seed)
        texts, rows = self._rows(prompt)
        start = self._start_ids() if texts is not None and start_of_document else []
        if streamer is not None and len(rows) != 1:
            raise ConfigError(f"a streamer needs one prompt, not {len(rows)}.")
        hear = None if streamer is None else self._listener(streamer, rows[0], texts is not None)
        continuations = generate(
            self,
            [start + row for row in rows],
            rules,
            max_length=None if max_length is None else max_length + len(start),
            max_new_tokens=max_new_tokens,
            end_ids=self._end_ids() if end_ids is None else end_ids,
            use_cache=use_cache,
            on_token=hear,
        )
        if texts is None:
            return self._ids_as_asked(prompt, continuations)
        whole = self._texts(texts, rows, continuations)
        return whole[0] if isinstance(prompt, str) else whole

    def _texts(
        self, prompts: list[str], rows: list[list[int]], continuations: list[Continuation]
    ) -> list[str]:
        """Each prompt with its continuation."""
        assert self.tokenizer is not None
        decode = self.tokenizer.decode
        return [
            prompt + continuation_text(decode, row, found.new_ids)
            for prompt, row, found in zip(prompts, rows, continuations)
        ]

    def _rows(self, prompt: Prompt) -> tuple[list[str] | None, list[list[int]]]:
        """The texts, where the prompt is text, and a row of ids for each."""
        if isinstance(prompt, Tensor):
            if prompt.is_floating_point() or prompt.dim() not in (1, 2):
                raise ConfigError(
                    f"a prompt tensor holds ids [tokens] or [batch, tokens], not {prompt.dtype} "
                    f"{list(prompt.shape)}."
                )
            return None, [prompt.tolist()] if prompt.dim() == 1 else prompt.tolist()
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], str)):
            if self.tokenizer is None:
                raise ConfigError("the model has no tokenizer: set model.tokenizer, or give token ids.")
            texts = [prompt] if isinstance(prompt, str) else list(cast("Sequence[str]", prompt))
            return texts, [self.tokenizer.encode(text) for text in texts]
        if prompt and isinstance(prompt[0], Sequence):
            return None, [list(row) for row in cast("Sequence[Sequence[int]]", prompt)]
        return None, [list(cast("Sequence[int]", prompt))]

    def _start_ids(self) -> list[int]:
        """The token that begins a document: what the tokenizer names, or the end of the one before."""
        assert self.tokenizer is not None
        named = self.tokenizer.settings.get("bos_token", END_OF_TEXT)
        name = named.get("content") if isinstance(named, dict) else named
        start = self.tokenizer.special_tokens.get(str(name))
        return [] if start is None or start >= self.config.vocab_size else [start]

    def _end_ids(self) -> list[int]:
        end = _end_id(self.tokenizer)
        return [] if end is None else [end]

    def _listener(
        self, streamer: Callable[[Any], None], prompt_ids: list[int], is_text: bool
    ) -> Callable[[int, int], None]:
        """What to call with each token of the only row."""
        if not is_text:
            return lambda _row, token: streamer(token)
        assert self.tokenizer is not None
        decoder = IncrementalDecoder(self.tokenizer.decode, prompt_ids)

        def hear(_row: int, token: int) -> None:
            piece = decoder.push(token)
            if piece:
                streamer(piece)

        return hear

    def _ids_as_asked(self, prompt: Prompt, continuations: list[Continuation]) -> Any:
        """Lists for lists, a tensor for a tensor."""
        rows = [found.ids for found in continuations]
        if isinstance(prompt, Tensor):
            longest = max((len(row) for row in rows), default=0)
            filler = self.tokenizer.padding_id if self.tokenizer is not None else 0
            filled = [row + [filler] * (longest - len(row)) for row in rows]
            result = torch.tensor(filled, dtype=torch.long, device=prompt.device)
            return result[0] if prompt.dim() == 1 else result
        is_batch = bool(prompt) and isinstance(prompt[0], Sequence)
        return rows if is_batch else rows[0]


def _end_id(tokenizer: Tokenizer | None) -> int | None:
    try:
        return None if tokenizer is None else tokenizer.end_of_text_id
    except DataError:  # a foreign tokenizer need not name one
        return None


def _check_weights(model: MegatronLmDecoder, weights: dict[str, Tensor], where: str) -> None:
    """Say in plain words what does not fit, before torch says it in its own."""
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
