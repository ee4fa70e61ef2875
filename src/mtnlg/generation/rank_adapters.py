"""Adapters of a model that is divided over ranks: how they come to a rank, and what it needs of them.

Rank 0 reads an adapter and sends it whole, once, when the first row asks for it; each rank cuts its part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from mtnlg.config import MegatronModelConfig
from mtnlg.config.adapter import HEAD_TARGET, AdapterConfig
from mtnlg.generation.adapters import LoadedAdapter
from mtnlg.interop.adapter import Adapter, LowRank, adapter_from_values, values_of
from mtnlg.parallel.inference import ReadWeights
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.weights import TIED_ORIGINAL

COLUMNS = (".query", ".key", ".value", ".gate", ".up", HEAD_TARGET)  # divided by their outputs
ROWS = (".attention.output", ".down")  # divided by their inputs


def pack_adapter(loaded: LoadedAdapter) -> tuple[list[int], Tensor]:
    """An adapter as a message: numbers that tell what it is, and its tensors as bytes, uint8 [count]."""
    adapter = loaded.adapter
    values = {name: one.detach().cpu().contiguous() for name, one in values_of(adapter).items()}
    content = torch.frombuffer(bytearray(save(values)), dtype=torch.uint8)
    scales = {name: one.scale for name, one in adapter.low_rank.items()}
    told = json.dumps({"config": asdict(adapter.config), "scales": scales}).encode()
    return [loaded.serial, len(content), *told], content


def unpack_adapter(numbers: list[int], content: Tensor) -> LoadedAdapter:
    """The adapter again, without its name."""
    told = json.loads(bytes(numbers[2:]))
    found = adapter_from_values(AdapterConfig(**told["config"]), load(content.numpy().tobytes()))
    low_rank = {name: replace(one, scale=told["scales"][name]) for name, one in found.low_rank.items()}
    adapter: Adapter = replace(found, low_rank=low_rank)
    return LoadedAdapter("", numbers[0], adapter)


class ShareOfBase:
    """What a rank has of the matrices below updates (:class:`~mtnlg.generation.stacked_updates.Base`).

    Args:
        config: of the whole model.
        mesh: this rank's place.
        read: gives weights; only updates with magnitudes need them.
        dtype: that they are rounded to.
    """

    def __init__(
        self, config: MegatronModelConfig, mesh: Mesh, read: ReadWeights, dtype: torch.dtype
    ) -> None:
        self._config, self._read, self._dtype, self._device = config, read, dtype, mesh.device
        self._rank, self._size = mesh.tensor_rank, mesh.tensor_size
        self._group = mesh.axis("tensor").get_group() if self._size > 1 else None

    def weight(self, name: str) -> Tensor:
        """See :class:`~mtnlg.generation.stacked_updates.Base`."""
        is_tied = name == HEAD_TARGET and self._config.tie_word_embeddings
        key = TIED_ORIGINAL if is_tied else f"{name}.weight"
        return self._of_file(key, lambda whole: self._columns(name, self._rows(name, whole)))

    def bias(self, name: str) -> Tensor | None:
        """See :class:`~mtnlg.generation.stacked_updates.Base`."""
        if self._is_divided(name, ROWS) or not self._has_bias(name):
            return None  # comes after the sum over ranks
        return self._of_file(f"{name}.bias", lambda whole: self._rows(name, whole))

    def part(self, name: str, one: LowRank) -> LowRank:
        """See :class:`~mtnlg.generation.stacked_updates.Base`."""
        magnitude = None if one.magnitude is None else self._rows(name, one.magnitude)
        return LowRank(self._columns(name, one.down), self._rows(name, one.up), one.scale, magnitude)

    def whole_squares(self, name: str, squares: Tensor) -> Tensor:
        """See :class:`~mtnlg.generation.stacked_updates.Base`."""
        if self._is_divided(name, ROWS):
            dist.all_reduce(squares, group=self._group)
        return squares

    def part_of_heads(self, prefix: Tensor) -> Tensor:
        """See :class:`~mtnlg.generation.stacked_updates.Base`."""
        return prefix[:, self._heads()]

    def _is_divided(self, name: str, endings: tuple[str, ...]) -> bool:
        return self._size > 1 and name.endswith(endings)

    def _rows(self, name: str, whole: Tensor) -> Tensor:
        """This rank's outputs, [out, ...]."""
        if not self._is_divided(name, COLUMNS):
            return whole
        if name.endswith((".key", ".value")):
            heads, size = self._heads(), self._config.head_size
            return whole[heads.start * size : heads.stop * size]
        return whole[self._own_of(len(whole))]

    def _columns(self, name: str, whole: Tensor) -> Tensor:
        """This rank's inputs, [..., in]."""
        return whole[:, self._own_of(whole.shape[1])] if self._is_divided(name, ROWS) else whole

    def _own_of(self, count: int) -> slice:
        largest = -(-count // self._size)  # as ``torch.chunk`` cuts
        return slice(self._rank * largest, (self._rank + 1) * largest)

    def _heads(self) -> slice:
        """Key and value heads that are computed here."""
        heads = self._config.key_value_heads
        if heads % self._size == 0:
            return self._own_of(heads)
        mine = self._rank * heads // self._size
        return slice(mine, mine + 1)

    def _has_bias(self, name: str) -> bool:
        config = self._config
        if ".attention." in name:
            is_output = name.endswith(".output")
            return config.has_attention_output_bias if is_output else config.attention_bias
        return name.startswith("layers.") and ".shared" not in name and config.mlp_bias

    def _of_file(self, key: str, cut: Callable[[Tensor], Tensor]) -> Tensor:
        [(_, found)] = self._read(frozenset([key]), lambda _, whole: cut(whole))
        return found.to(self._device, self._dtype)
