"""Checkpoints of Megatron-LM: read in both of its layouts, written in the newer.

```
CHECKPOINT/
  latest_checkpointed_iteration.txt     a number, or "release"
  iter_0001000/                         or release/
    .metadata, __0_0.distcp, common.pt, metadata.json      torch_dist (since 2024)
    mp_rank_00/model_optim_rng.pt, mp_rank_00_001/…        torch: tensor rank, pipeline rank
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.config.moe import has_experts
from mtnlg.config.progress import Progress, no_progress
from mtnlg.interop.distributed_file import METADATA, DistributedWriter, tensors_in
from mtnlg.interop.megatron_config import config_of_options, options_of_config
from mtnlg.interop.megatron_experts import is_mixture, is_uniform
from mtnlg.interop.megatron_names import layer_part, layers_of_megatron
from mtnlg.interop.megatron_ranks import join_ranks
from mtnlg.interop.named_tensors import NamedTensors, megatron_tensors
from mtnlg.interop.torch_file import read_torch_file
from mtnlg.model import MegatronLmDecoder

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(?P<tensor>\d+)(?:_(?P<pipeline>\d+))?(?:_\d+)?")
_PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Layers that keep a state of their own beside weights, empty unless they compute in float8.
_WITH_EXTRA_STATE = (
    *("self_attention.core_attention", "self_attention.linear_proj", "self_attention.linear_qkv"),
    *("mlp.linear_fc1", "mlp.linear_fc2"),
)


def is_megatron(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint of Megatron-LM, or one iteration of it."""
    if (folder / TRACKER).is_file():
        return True
    return (folder / METADATA).is_file() or any(folder.glob("mp_rank_*/model_optim_rng.pt"))


def open_megatron(folder: Path) -> NamedTensors:
    """The model of a checkpoint; no weights are read yet.

    Raises:
        CheckpointError: files are missing or damaged, or hold a model that we do not compute.
    """
    iteration = _iteration(folder)
    if (iteration / METADATA).is_file():
        common = iteration / "common.pt"
        options = read_torch_file(common).get("args")
        if options is None:
            raise CheckpointError(f"{common}: it holds no args, so the model's shape is not known.")
        theirs = _without_stacks(tensors_in(iteration))
        return _model(theirs, options, str(common))
    return _model(*_of_ranks(iteration))


def _model(theirs: Mapping[str, Tensor], options: Any, where: str) -> NamedTensors:
    embedding = theirs.get("embedding.word_embeddings.weight")
    rows = None if embedding is None else embedding.shape[0]
    return megatron_tensors(theirs, config_of_options(options, where, rows), str(Path(where).parent))


def _iteration(folder: Path) -> Path:
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    name = tracker.read_text(encoding="utf-8").strip()
    chosen = folder / (f"iter_{int(name):07d}" if name.isdigit() else Path(name).name)
    if not chosen.is_dir():
        raise CheckpointError(f"{tracker}: it names {name!r}, and there is no folder {chosen.name}.")
    return chosen


def _without_stacks(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers one by one: alike, they are stored as one tensor with the layer as the first axis."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        name = re.sub(r"^(model\.|module\.)+", "", name)
        if name.startswith(("optimizer.", "chained_")):
            continue
        rest = name.removeprefix("decoder.layers.")
        if rest != name and not rest.split(".")[0].isdigit():
            for index, layer in enumerate(tensor.unbind(0)):
                found[f"decoder.layers.{index}.{layer_part(rest)}"] = layer
        elif rest != name:
            number, _, part = rest.partition(".")
            found[f"decoder.layers.{number}.{layer_part(part)}"] = tensor
        else:
            found[name] = tensor
    return found


def _of_ranks(iteration: Path) -> tuple[dict[str, Tensor], Any, str]:
    """Tensors of all ranks of the older layout put together, the options, and their file."""
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(iteration.glob("mp_rank_*/model_optim_rng.pt")):
        match = _RANK.fullmatch(path.parent.name)
        if match:
            place = int(match["pipeline"] or 0), int(match["tensor"])
            files.setdefault(place, path)
    if not files:
        raise CheckpointError(
            f"{iteration}: neither .metadata and *.distcp nor mp_rank_*/model_optim_rng.pt: no weights "
            "of Megatron-LM."
        )
    states = {place: read_torch_file(path) for place, path in files.items()}
    first_path, first = next(iter(files.values())), next(iter(states.values()))
    if first.get("args") is None:
        raise CheckpointError(f"{first_path}: it holds no args, so the model's shape is not known.")
    if is_mixture(vars(first["args"])):
        raise CheckpointError(
            f"{first_path}: num_experts is {first['args'].num_experts}: experts are read from distributed "
            "checkpoints only (Megatron-LM's --ckpt-convert-format torch_dist makes one)."
        )
    version = float(first.get("checkpoint_version", 0) or 0)
    if version < 2.0:
        raise CheckpointError(
            f"{first_path}: checkpoint_version is {version}: only 2.0 and newer can be read (before, heads "
            "were ordered otherwise)."
        )
    return join_ranks(states, first["args"], str(iteration)), first["args"], str(first_path)


def write_megatron(
    folder: Path,
    config: MegatronModelConfig,
    stream: Callable[[Collection[str]], Iterable[tuple[str, Tensor]]],
    dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write a distributed checkpoint, which Megatron-LM loads in any layout of its own.

    Args:
        folder: created if need be; gets a release and the file that names it.
        config: the architecture.
        stream: gives parameters by our names.
        dtype: of the weights; ``None`` keeps theirs.
        progress: told of parameters.

    Returns:
        The folder of the weights.

    Raises:
        ConfigError: Megatron-LM does not compute this model.
        CheckpointError: weights are missing, or the disk refused.
    """
    with torch.device("meta"):
        names = set(MegatronLmDecoder(config).state_dict())
    if config.tie_word_embeddings:
        names.discard("head.output.weight")
    written = 0

    def read(name: str) -> Tensor:
        nonlocal written
        found = dict(stream([name]))
        if name not in found:
            raise CheckpointError(f"weights are missing: {name}.")
        written += found[name].numel()
        progress("writing", written, config.num_parameters, "parameters")
        return found[name].to(dtype)

    precision = dtype or next(iter(stream(["embedding.tokens.weight"])))[1].dtype
    options = options_of_config(config, _PRECISIONS.get(precision, ""))
    release = folder / "release"
    try:
        release.mkdir(parents=True, exist_ok=True)
        for old in (*release.glob("*.distcp"), release / METADATA):
            old.unlink(missing_ok=True)
        writer = DistributedWriter(release)
        for name, tensor, offsets, shape in _parts(layers_of_megatron(read, config, names), config):
            writer.add_part(name, tensor, offsets, shape)
        for name in _extra_states(config):
            writer.add_object(name, [None])
        torch.save({"args": options, "iteration": 0, "checkpoint_version": 3.0}, release / "common.pt")
        written_by = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        written_by |= {"common_backend": "torch", "common_backend_version": 1}
        (release / "metadata.json").write_text(json.dumps(written_by))
        writer.finish()
        (folder / TRACKER).write_text("release")
    except OSError as error:
        raise CheckpointError(f"{folder}: the checkpoint could not be written ({error}).") from error
    return release


def _parts(
    tensors: Iterable[tuple[str, int | None, Tensor]], config: MegatronModelConfig
) -> Iterator[tuple[str, Tensor, list[int], list[int]]]:
    """Each tensor with its place: layers are stacked, and gates stand before what they gate."""
    for name, layer, tensor in tensors:
        if layer is None:
            yield name, tensor, [0] * tensor.dim(), list(tensor.shape)
            continue
        if not is_uniform(config):
            yield (
                name.replace("layers.", f"layers.{layer}."),
                tensor,
                [0] * tensor.dim(),
                list(tensor.shape),
            )
            continue
        shape = [config.num_hidden_layers, *tensor.shape]
        halves = 2 if config.is_gated and "linear_fc1." in name and "layer_norm" not in name else 1
        begin = 0
        for half in tensor.chunk(halves):
            yield name, half[None], [layer, begin, *[0] * (tensor.dim() - 1)], shape
            begin += half.shape[0]


def _extra_states(config: MegatronModelConfig) -> Iterator[str]:
    """Names of what layers keep beside their weights."""
    count, is_stacked = config.num_hidden_layers, is_uniform(config)
    for index in range(count):
        place = "" if is_stacked else f"{index}."
        offset, size = ([index], [count]) if is_stacked else ([], [])
        parts = [
            (part, offset or [0], size or [1]) for part in _WITH_EXTRA_STATE if part.startswith("self")
        ]
        if has_experts(config, index):
            shared = "mlp.shared_experts.linear_fc" if config.num_shared_experts else None
            parts += [(f"{shared}{n}", offset or [0], size or [1]) for n in (1, 2) if shared]
            for expert in range(config.num_experts or 0):
                where = [*offset, expert], [*size, config.num_experts or 0]
                parts += [(f"mlp.experts.experts.linear_fc{n}", *where) for n in (1, 2)]
        else:
            parts += [
                (part, offset or [0], size or [1]) for part in _WITH_EXTRA_STATE if part.startswith("mlp")
            ]
        for part, at, of in parts:
            numbers = "_".join(".".join(map(str, numbers)) for numbers in (at, of))
            yield f"decoder.layers.{place}{part}._extra_state/shard_{numbers}"
