"""Keys and values of earlier tokens, so that each new token costs one step instead of a whole pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtnlg.model import MegatronLmDecoder

FIRST_CAPACITY = 256  # tokens; memory doubles from here when it runs out


class KeyValueCache:
    """What each layer's attention has computed so far, for a batch of sequences of any lengths.

    Row ``r`` holds its tokens in columns ``0 .. lengths[r] - 1``; what lies behind is unused and
    hidden by :meth:`mask`. Rows may thus be of different ages, be cut back and be dropped, which is
    all that a scheduler of many requests needs.

    Args:
        layer_indices: global numbers of the layers that will file something here, in order.
        batch_size: rows.
        capacity: tokens to hold memory for at first; it doubles when that is not enough.
    """

    def __init__(
        self, layer_indices: Sequence[int], batch_size: int, capacity: int = FIRST_CAPACITY
    ) -> None:
        self.lengths = [0] * batch_size
        self._capacity = max(1, capacity)
        self._last_layer = layer_indices[-1]
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @classmethod
    def for_model(
        cls, model: MegatronLmDecoder, batch_size: int, capacity: int = FIRST_CAPACITY
    ) -> KeyValueCache:
        """An empty cache for the layers that ``model`` has."""
        return cls([int(name) for name in model.layers], batch_size, capacity)

    @property
    def length(self) -> int:
        """Tokens of the longest row that every layer holds."""
        return max(self.lengths, default=0)

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in length, so that attention needs :meth:`mask`."""
        return len(set(self.lengths)) > 1

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for held in (self._keys, self._values) for t in held.values())

    def update(self, layer_index: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new columns; the last layer's call completes the step for all.

        Args:
            layer_index: global number of the layer.
            key: [batch, key_value_heads, new, head_dim].
            value: the same shape.

        Returns:
            Views of all keys and values, [batch, key_value_heads, length + new, head_dim].
        """
        num_new = key.shape[2]
        end = self.length + num_new
        held_keys = self._write(self._keys, layer_index, key, end)
        held_values = self._write(self._values, layer_index, value, end)
        if layer_index == self._last_layer:
            self.lengths = [length + num_new for length in self.lengths]
        return held_keys[:, :, :end], held_values[:, :, :end]

    def mask(self, num_new: int, device: torch.device) -> Tensor | None:
        """[batch, 1, new, length + new], true where a new token may see a key.

        ``None`` where all rows are equally long and plain causal attention says the same.
        """
        if not self.is_ragged:
            return None
        columns = torch.arange(self.length + num_new, device=device)
        return (columns <= self._new_columns(num_new, device)[..., None])[:, None]

    def positions(self, num_new: int, device: torch.device) -> Tensor | None:
        """[batch, new] positions of the next tokens; ``None`` where all rows count on alike."""
        return self._new_columns(num_new, device) if self.is_ragged else None

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all but the first ``lengths[r]`` tokens of each row ``r``."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate rows of {self.lengths} tokens to {list(lengths)}")
        self.lengths = list(lengths)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop every row but ``rows``, which take their places in the order given."""
        self.lengths = [self.lengths[row] for row in rows]
        for held in (self._keys, self._values):
            for layer, tensor in held.items():
                held[layer] = tensor[torch.tensor(rows, dtype=torch.long, device=tensor.device)]

    def _new_columns(self, num_new: int, device: torch.device) -> Tensor:
        starts = torch.tensor(self.lengths, device=device)
        return starts[:, None] + torch.arange(num_new, device=device)  # [batch, new]

    def _write(self, held: dict[int, Tensor], layer_index: int, new: Tensor, end: int) -> Tensor:
        tensor = self._room(held, layer_index, new, end)
        num_new = new.shape[2]
        if self.is_ragged:
            rows = torch.arange(len(new), device=new.device)[:, None]
            tensor[rows, :, self._new_columns(num_new, new.device)] = new.transpose(1, 2)
        else:
            tensor[:, :, end - num_new : end] = new
        return tensor

    def _room(self, held: dict[int, Tensor], layer_index: int, like: Tensor, end: int) -> Tensor:
        """The layer's tensor, made or doubled so that ``end`` columns fit."""
        tensor = held.get(layer_index)
        if tensor is not None and tensor.shape[2] >= end:
            return tensor
        while self._capacity < end:
            self._capacity *= 2
        batch, heads, _, size = like.shape
        # Zeros, because attention multiplies unseen columns by 0, and 0 times a stray NaN is NaN.
        larger = like.new_zeros(batch, heads, self._capacity, size)
        if tensor is not None:
            larger[:, :, : tensor.shape[2]] = tensor
        held[layer_index] = larger
        return larger
