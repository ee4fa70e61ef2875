"""Writes ONNX (onnx.ai), for programs that run a graph without PyTorch: ONNX Runtime and its kin.

The graph is one pass over whole texts: ids in, logits of every position out. It has no cache of keys and
values, so it is made for scoring, ranking and the first token after a prompt. Text could be continued by
giving it back one token longer each time, and that computes everything anew.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mtnlg.config import CheckpointError, ConfigError, MegatronModelConfig
from mtnlg.config.progress import Progress, no_progress
from mtnlg.model import MegatronLmDecoder, NoInitialization
from mtnlg.model.attention import Attention
from mtnlg.model.attention_scores import ScoredAttention, scores_of_layer
from mtnlg.tokens import Tokenizer

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

Stream = Callable[[Collection[str]], Iterable[tuple[str, Tensor]]]
OWN_CONFIG = "mtnlg.config"  # metadata of the file: the architecture
MAX_EMBEDDED_BYTES = 1_900_000_000  # a message of protobuf, the graph and all, ends at 2^31 bytes
_HEAD = "head.output.weight"
_PRECISIONS = (torch.float32, torch.float16)
_CHATTY = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._dynamo")


def write_onnx(
    path: Path,
    config: MegatronModelConfig,
    stream: Stream,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    max_embedded_bytes: int = MAX_EMBEDDED_BYTES,
) -> Path:
    """Write a decoder as one ONNX graph.

    Its input is ``input_ids`` [batch, sequence], int64, any number of texts of any length up to
    ``max_position_embeddings``; its output ``logits`` [batch, sequence, vocab]. Attention is causal: what
    stands behind a text to fill its row changes nothing before. There is **no key/value cache**.

    All weights are in memory at once. Larger ones than a file of protobuf holds lie beside it, in
    ``path`` with ``.data`` behind its name. The file's metadata hold the architecture (``mtnlg.config``)
    and the files of the tokenizer by their names (``tokenizer.json``, ...).

    Args:
        path: the file; replaced when the new one is whole.
        config: the architecture.
        stream: gives parameters by our names.
        tokenizer: goes along as metadata; without it only ids can be used.
        dtype: of weights and logits, float32 or float16.
        progress: told of parameters, then of steps.
        max_embedded_bytes: more bytes of weights lie beside the file.

    Raises:
        ConfigError: such a model cannot be written, or the packages are not installed.
        CheckpointError: weights are missing, or the disk refused.
    """
    _check(config, dtype)
    model = _model(config, stream, dtype, progress)
    progress("tracing", 0, 2, "steps")
    program = _traced(model)
    progress("tracing", 1, 2, "steps")
    program.model.metadata_props.update(_metadata(config, tokenizer))
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(program, path, nbytes > max_embedded_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: the file could not be written ({error}).") from error
    progress("tracing", 2, 2, "steps")
    return path


def data_file(path: Path) -> Path:
    """Where weights lie that are too large for the file ``path``."""
    return path.with_name(f"{path.name}.data")


def _check(config: MegatronModelConfig, dtype: torch.dtype) -> None:
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError(
            'ONNX needs the packages onnx and onnxscript: pip install "mtnlg[onnx]".'
        ) from None
    if config.has_encoder:
        raise ConfigError(
            "ONNX: encoder-decoders cannot be written, only decoders: their two halves are two graphs."
        )
    if config.num_experts:
        raise ConfigError(
            "ONNX: mixtures of experts cannot be written: a graph has no kernel for as many tokens at each "
            "expert as are sent there."
        )
    if dtype not in _PRECISIONS:
        raise ConfigError(
            "ONNX: precision bf16 cannot be written, for ONNX Runtime's CPU has no kernels for it: "
            "take float32 or fp16."
        )


def _model(
    config: MegatronModelConfig, stream: Stream, dtype: torch.dtype, progress: Progress
) -> MegatronLmDecoder:
    """The decoder with its weights, whose attention asks nothing of the sizes it is given."""
    with torch.device("meta"), NoInitialization():
        model = MegatronLmDecoder(config)
    names = set(model.state_dict()) - ({_HEAD} if config.tie_word_embeddings else set())
    weights: dict[str, Tensor] = {}
    done = 0
    for name, tensor in stream(frozenset(names)):
        weights[name] = tensor.to(dtype)
        done += tensor.numel()
        progress("reading", done, config.num_parameters, "parameters")
    if missing := sorted(names - weights.keys()):
        raise CheckpointError(f"weights are missing: {', '.join(missing[:8])}.")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for index, layer in model.layers.items():
        own = scores_of_layer(config, int(index)) or ScoredAttention()
        attention = cast(Attention, layer.attention)
        attention.attention_function = _MaskedAttention(own.window, own.slopes, own.softcap)
    return model.eval().requires_grad_(False)


class _MaskedAttention(ScoredAttention):
    """Attention by a mask always: whether one is needed would be decided once, by the example's length."""

    def seen(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """[1, 1, sequence, keys], true where a query sees a key."""
        positions = torch.arange(key.shape[2])
        distances = positions[:, None] - positions
        seen = distances >= 0
        if self.window is not None:
            seen = seen & (distances < self.window)
        return seen[None, None]


class _Logits(nn.Module):
    """A decoder that takes ids alone and returns logits alone."""

    def __init__(self, decoder: MegatronLmDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """[batch, sequence] → [batch, sequence, vocab]"""
        logits = self.decoder(input_ids).logits
        assert logits is not None
        return logits


def _traced(model: MegatronLmDecoder) -> ONNXProgram:
    """The graph, for every number of texts and of tokens."""
    longest = model.config.max_position_embeddings
    shapes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if longest > 1:
        shapes[1] = torch.export.Dim("sequence", min=1, max=longest)
    example = torch.zeros(2, min(longest, 5), dtype=torch.int64)
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                _Logits(model).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": shapes},
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigError(f"ONNX: torch.onnx could not write this model ({reason}).") from error
    assert program is not None
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter has to tell is for its own developers; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before):
                logger.setLevel(level)


def _metadata(config: MegatronModelConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    found = {OWN_CONFIG: json.dumps(config.to_dict())}
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = [one for one in Path(folder).rglob("*") if one.is_file()]
            found |= {str(one.relative_to(folder)): one.read_text(encoding="utf-8") for one in files}
    return found


def _save(program: ONNXProgram, path: Path, beside: bool) -> None:
    """Under another name first; the weights are in place before the graph that names them."""
    import onnx_ir

    data = data_file(path)
    folder = path.with_name(f".{path.name}.writing")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        onnx_ir.save(program.model, folder / path.name, external_data=data.name if beside else None)
        if beside:
            os.replace(folder / data.name, data)
        os.replace(folder / path.name, path)
        if not beside:
            data.unlink(missing_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
