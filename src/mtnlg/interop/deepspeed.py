"""Checkpoints of DeepSpeed (ZeRO 0 to 3) and of Megatron-DeepSpeed, with pipeline modules or without.

```
CHECKPOINT/
  latest                                             the name of the newest
  global_step1000/
    mp_rank_00_model_states.pt                       weights of a tensor rank, their shapes, options
    zero_pp_rank_0_mp_rank_00_model_states.pt        the same with ZeRO 3
    [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt a data rank's part of the float32 weights
    layer_01-model_00-model_states.pt                a pipeline module's layer, of a tensor rank
```

Where float32 weights are there they are read, else what the model computed with. With ZeRO 1 and 2 the
ranks' parts of a group of parameters, one after the other, are these parameters flattened; with ZeRO 3
every parameter is cut over the ranks, the last part filled up. Buffers, and what ZeRO 1 did not train, are
among the module's own tensors; frozen parameters of ZeRO 3 are cut too, in the files of model states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mtnlg.config import CheckpointError
from mtnlg.interop.lazy_tensor import join
from mtnlg.interop.megatron_config import config_of_options
from mtnlg.interop.megatron_ranks import join_ranks
from mtnlg.interop.named_tensors import NamedTensors, megatron_tensors
from mtnlg.interop.torch_file import as_lazy, read_torch_file

LATEST = "latest"
_STATES = "*_model_states.pt"
_RANKS = re.compile(r"(?:bf16_|fp16_)?(?:zero_pp_rank_(?P<data>\d+)_)?mp_rank_(?P<tensor>\d+)_.*")
_LAYER = re.compile(r"layer_(?P<layer>\d+)-model_(?P<tensor>\d+)-model_states\.pt")


@dataclass(frozen=True)
class DeepSpeedModel:
    """What a checkpoint holds.

    Args:
        megatron: the model, where it is Megatron's.
        tensors: else its tensors by the names of the module that was trained.
    """

    megatron: NamedTensors | None
    tensors: Mapping[str, Tensor]


def is_deepspeed(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint of DeepSpeed, or one step of it."""
    latest = folder / LATEST
    if latest.is_file() and not (folder / "step-00000000").exists():
        return any(_step_folder(folder).glob(_STATES))
    return any(folder.glob(_STATES))


def open_deepspeed(folder: Path) -> DeepSpeedModel:
    """The model of a checkpoint; no weights are read yet.

    Raises:
        CheckpointError: files are missing or damaged, or hold a model that we do not compute.
    """
    step = _step_folder(folder)
    if experts := sorted(step.glob("*expert_*_states.pt")) + sorted(step.glob("expp_rank_*_states.pt")):
        raise CheckpointError(f"{experts[0]}: experts of DeepSpeed are not read.")
    states = {rank: read_torch_file(path) for rank, path in _first_files(step).items()}
    if not states:
        raise CheckpointError(f"{step}: no mp_rank_*_model_states.pt: no weights of DeepSpeed.")
    first = states[min(states)]
    options = first.get("args")
    is_megatron = hasattr(options, "num_layers") and hasattr(options, "num_attention_heads")
    layers = _pipeline_layers(step)
    if layers:
        by_rank: dict[int, dict[str, Tensor]] = layers
    else:
        by_rank = {rank: _tensors(step, rank, state) for rank, state in states.items()}
    if not is_megatron:
        return DeepSpeedModel(None, by_rank[min(by_rank)])
    width = int(getattr(options, "tensor_model_parallel_size", len(by_rank)) or 1)
    # Pipeline ranks share the files of layers; elsewhere each rank's number counts both.
    ranks = {(0, rank): {"model": tensors} for rank, tensors in by_rank.items()}
    if not layers and len(by_rank) > width:
        ranks = {divmod(rank, width): {"model": tensors} for rank, tensors in by_rank.items()}
    theirs = join_ranks(ranks, _Sizes(options, bool(layers)), str(step))
    rows = theirs.get("embedding.word_embeddings.weight")
    config = config_of_options(options, str(step), None if rows is None else rows.shape[0])
    return DeepSpeedModel(megatron_tensors(theirs, config, str(step)), {})


class _Sizes:
    """Megatron's options as far as they say how ranks divided the files."""

    def __init__(self, options: Any, has_layer_files: bool) -> None:
        self.swiglu = getattr(options, "swiglu", False)
        self.tensor_model_parallel_size = getattr(options, "tensor_model_parallel_size", 1)
        size = getattr(options, "pipeline_model_parallel_size", 1)
        self.pipeline_model_parallel_size = 1 if has_layer_files else size


def _step_folder(folder: Path) -> Path:
    latest = folder / LATEST
    if not latest.is_file():
        return folder
    return folder / Path(latest.read_text(encoding="utf-8", errors="replace").strip()).name


def _first_files(step: Path) -> dict[int, Path]:
    """The file of model states of each tensor rank (of its first data rank)."""
    found: dict[int, Path] = {}
    for path in sorted(step.glob(_STATES), key=_natural):
        match = _RANKS.fullmatch(path.name)
        if match and int(match["data"] or 0) == 0:
            found.setdefault(int(match["tensor"]), path)
    return found


def _natural(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _tensors(step: Path, rank: int, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one tensor rank by name."""
    parts = sorted(step.glob(f"*zero_pp_rank_*_mp_rank_{rank:02d}_optim_states.pt"), key=_natural)
    module = dict(_named(state.get("module") or {}))
    if not (parts and state.get("param_shapes")):
        if module and not any(tensor.numel() for tensor in module.values()):
            raise CheckpointError(
                f"{step}: ZeRO 3 keeps the weights in zero_pp_rank_*_optim_states.pt, and there are none."
            )
        return module
    found = dict(_float32(parts, state))
    found |= _frozen(step, rank, state)
    # With ZeRO 3 the module's parameters are empty; its buffers are always whole.
    rest = {name: tensor for name, tensor in module.items() if tensor.numel() and name not in found}
    for name, source in dict(state.get("shared_params") or {}).items():
        if (source := source.removeprefix("module.")) in found:
            rest[name.removeprefix("module.")] = found[source]
    return found | rest


def _frozen(step: Path, rank: int, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What was not trained: whole, or with ZeRO 3 cut over the data ranks as the others are."""
    shapes = state.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    files = sorted(step.glob(f"zero_pp_rank_*_mp_rank_{rank:02d}_model_states.pt"), key=_natural)
    ranks = [read_torch_file(path) for path in files] or [state]
    parts = [dict(_named(one.get("frozen_param_fragments") or {})) for one in ranks]
    found = {}
    for name, shape in shapes.items():
        name = name.removeprefix("module.")
        whole = join([part[name].flatten() for part in parts if name in part])
        if whole.numel() < shape.numel():
            raise CheckpointError(f"{step}: the files of model states hold only a part of {name}.")
        found[name] = whole[: shape.numel()].view(shape)
    return found


def _named(module: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in module.items():
        if isinstance(value, Mapping):
            yield from _named(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}".removeprefix("module."), as_lazy(value)


def _float32(parts: list[Path], state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The float32 weights, put together from the data ranks' parts."""
    saved = [read_torch_file(path)["optimizer_state_dict"] for path in parts]
    shapes = state["param_shapes"]
    groups: list[Mapping[str, Any]] = list(shapes) if isinstance(shapes, (list, tuple)) else [shapes]
    count = saved[0].get("partition_count", len(saved))
    expected = max(count) if isinstance(count, (list, tuple)) else int(count)
    if expected != len(saved):
        raise CheckpointError(
            f"{parts[0].parent}: the optimizer was saved by {expected} data ranks and there are files of "
            f"{len(saved)}."
        )
    where = str(parts[0].parent)
    if "fp32_flat_groups" in saved[0]:
        ranks = [join([as_lazy(part.flatten()) for part in one["fp32_flat_groups"]]) for one in saved]
        merged = {name: shape for group in groups for name, shape in group.items()}
        yield from _of_stage_3(ranks, merged, where)
        return
    gaps = saved[0].get("param_alignment_paddings") or [[0] * len(group) for group in groups]
    for number, group in enumerate(groups):
        flat = join([as_lazy(one["single_partition_of_fp32_groups"][number]) for one in saved])
        # The whole is filled up to a multiple of twice the ranks.
        if not 0 <= flat.numel() - _size(group, gaps[number]) < 2 * len(saved):
            raise _of_another_size(where)
        yield from _of_stage_2(flat, group, gaps[number])


def _of_another_size(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the optimizer's parts have another size than the weights they are of."
    )


def _size(group: Mapping[str, Any], gaps: Iterable[int]) -> int:
    return int(sum(shape.numel() for shape in group.values()) + sum(gaps))


def _of_stage_2(flat: Tensor, group: Mapping[str, Any], gaps: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The parameters one after the other; ``gaps`` follow them where each begins at an aligned address."""
    begin = 0
    for (name, shape), gap in zip(group.items(), gaps, strict=True):
        size = shape.numel()
        yield name.removeprefix("module."), flat[begin : begin + size].view(shape)
        begin += size + gap


def _of_stage_3(ranks: list[Tensor], shapes: Mapping[str, Any], where: str) -> Iterator[tuple[str, Tensor]]:
    sizes = {name: -(-shape.numel() // len(ranks)) for name, shape in shapes.items()}
    if {rank.numel() for rank in ranks} != {sum(sizes.values())}:
        raise _of_another_size(where)
    begin = 0
    for name, shape in shapes.items():
        end = begin + sizes[name]
        whole = join([rank[begin:end] for rank in ranks])
        yield name.removeprefix("module."), whole[: shape.numel()].view(shape)
        begin = end


def _pipeline_layers(step: Path) -> dict[int, dict[str, Tensor]]:
    """The layers of a pipeline module by tensor rank, under Megatron's names; empty if there are none."""
    files: dict[int, dict[int, Path]] = {}
    for path in step.glob("layer_*-model_states.pt"):
        if match := _LAYER.fullmatch(path.name):
            files.setdefault(int(match["tensor"]), {})[int(match["layer"])] = path
    return {tensor: dict(_layers(mine)) for tensor, mine in files.items()}


def _layers(files: Mapping[int, Path]) -> Iterator[tuple[str, Tensor]]:
    """What a layer is, is told by what it holds: their numbers differ from release to release."""
    index = 0
    has_embedding = False
    for _, path in sorted(files.items()):
        held = dict(_named(read_torch_file(path)))
        if any("query_key_value" in name for name in held):
            for name, tensor in held.items():
                yield f"encoder.layers.{index}.{name}", tensor
            index += 1
        elif any("word_embeddings" in name for name in held):
            if not has_embedding:  # the last layer holds it once more, tied
                yield from ((f"embedding.{name}", tensor) for name, tensor in held.items())
            has_embedding = True
        elif "lm_head.weight" in held:
            yield "output_layer.weight", held["lm_head.weight"]
        else:
            for name, tensor in held.items():
                yield f"encoder.final_layernorm.{name.split('.')[-1]}", tensor
