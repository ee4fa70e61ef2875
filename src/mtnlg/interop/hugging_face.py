"""Hugging Face model folders: ``config.json`` and safetensors, read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.config.progress import Progress, no_progress
from mtnlg.interop.architectures import from_hugging_face, nearest_architecture, to_hugging_face
from mtnlg.interop.encoder_decoder_families import (
    ENCODER_DECODER_FAMILIES,
    HAS_OWN_HEAD,
    has_own_head,
    special_ids,
)
from mtnlg.interop.lazy_tensor import Cut
from mtnlg.interop.tensor_folder import MAX_SHARD_BYTES, TensorFolder, write_tensors
from mtnlg.interop.weights import EMBEDDING, HEAD, export_tensors, import_tensors
from mtnlg.model import MegatronEncoderDecoder, MegatronLmDecoder

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"


def read_config(folder: Path) -> MegatronModelConfig:
    """The architecture in ``folder/config.json``.

    Raises:
        CheckpointError: the file is missing, broken, or of an architecture that is not ours.
    """
    saved = _read_json(folder / CONFIG_NAME)
    if saved.get("model_type") in ENCODER_DECODER_FAMILIES:
        tensors = TensorFolder.of_hugging_face(folder)
        saved = {**saved, HAS_OWN_HEAD: has_own_head(saved, tensors)}
    return from_hugging_face(saved, str(folder / CONFIG_NAME))


def model_type_of(folder: Path) -> str:
    """The family that ``folder/config.json`` names."""
    return str(_read_json(folder / CONFIG_NAME)["model_type"])


def read_weights(folder: Path, config: MegatronModelConfig) -> dict[str, Tensor]:
    """All parameters of ``config`` by our names, from the safetensors in ``folder``.

    Raises:
        CheckpointError: files are missing or damaged, or tensors do not fit the config.
    """
    state = dict(stream_weights(folder, config))
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    return state


def stream_weights(
    folder: Path,
    config: MegatronModelConfig,
    wanted: Collection[str] | None = None,
    cut: Cut | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Parameters by our names, one after the other; a tied head is not among them.

    Args:
        folder: of safetensors.
        config: the architecture.
        wanted: only these; ``None`` is all.
        cut: what is wanted of each: a view of it; nothing else is read. ``None`` is all.

    Raises:
        CheckpointError: as :func:`read_weights`.
    """
    model_type = model_type_of(folder)
    source = TensorFolder.of_hugging_face(folder)
    yield from import_tensors(model_type, config, source, str(folder), wanted, cut)


def write_hugging_face(
    model: MegatronLmDecoder | MegatronEncoderDecoder,
    folder: Path,
    *,
    end_of_text_id: int | None = None,
    padding_id: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model`` as the nearest Hugging Face architecture.

    Args:
        model: a whole one (not a pipeline stage) with its weights.
        folder: created if need be; weights of an earlier save there are replaced.
        end_of_text_id: recorded as the family's end (and begin) token.
        padding_id: recorded likewise.
        dtype: of the saved weights; ``None`` keeps theirs.
        max_shard_bytes: largest weight file.

    Raises:
        ConfigError: no architecture computes this config; the message names the fields.
        CheckpointError: the disk refused.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    if any(parameter.is_meta for parameter in parameters.values()):
        raise CheckpointError(f"{folder}: the model is on the meta device and has no weights to save.")
    write_hugging_face_folder(
        folder,
        model.config,
        lambda names: ((name, parameters[name].detach()) for name in names),
        end_of_text_id=end_of_text_id,
        padding_id=padding_id,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def write_hugging_face_folder(
    folder: Path,
    config: MegatronModelConfig,
    stream: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]],
    *,
    end_of_text_id: int | None = None,
    padding_id: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = no_progress,
) -> None:
    """Write weights that lie anywhere, one tensor in memory beside one file's.

    Args:
        folder: created if need be; weights of an earlier save there are replaced.
        config: the architecture.
        stream: gives parameters by our names.
        end_of_text_id: recorded as the family's end (and begin) token.
        padding_id: recorded likewise.
        dtype: of the saved weights; ``None`` keeps theirs.
        max_shard_bytes: largest weight file.
        progress: told of parameters.

    Raises:
        ConfigError: no architecture computes this config; the message names the fields.
        CheckpointError: weights are missing, or the disk refused.
    """
    saved = to_hugging_face(config)
    model_type = nearest_architecture(config).model_type

    written = 0

    def read(name: str) -> Tensor:
        nonlocal written
        found = dict(stream([name]))
        if name not in found:
            raise CheckpointError(f"weights are missing: {name}.")
        written += found[name].numel()
        progress("writing", written, config.num_parameters, "parameters")
        is_bias = name.endswith("selection_bias")  # transformers keeps it in float32, too
        return found[name] if is_bias else found[name].to(dtype)

    saved["dtype"] = str(dtype or read(EMBEDDING).dtype).removeprefix("torch.")
    written = 0
    tokens: dict[str, int | None] = dict(
        bos_token_id=end_of_text_id, eos_token_id=end_of_text_id, pad_token_id=padding_id
    )
    if config.architecture == "encoder_decoder":
        tokens = {**special_ids(config)}
    saved |= tokens
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder, export_tensors(model_type, config, read), max_shard_bytes)
        _write_json(folder / CONFIG_NAME, saved)
        given = {name: token for name, token in tokens.items() if token is not None}
        _write_json(folder / GENERATION_NAME, given)
    except OSError as error:
        raise CheckpointError(f"{folder}: the model could not be saved ({error}).") from error


def _read_json(path: Path) -> dict:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: broken JSON ({error}).") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: it must hold a JSON object, not a {type(parsed).__name__}.")
    return parsed


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
