"""A model whose parameters are known by our names, wherever their numbers lie."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtnlg.config import CheckpointError, MegatronModelConfig
from mtnlg.interop.lazy_tensor import Cut, cut_and_read
from mtnlg.interop.megatron_names import to_ours
from mtnlg.model import MegatronLmDecoder

HEAD, EMBEDDING = "head.output.weight", "embedding.tokens.weight"


@dataclass(frozen=True)
class NamedTensors:
    """A model in files of others.

    Args:
        config: the architecture.
        tensors: lazy, by our names; a tied head is not among them.
    """

    config: MegatronModelConfig
    tensors: Mapping[str, Tensor]

    def stream(
        self, wanted: Collection[str] | None = None, cut: Cut | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Parameters one after the other.

        Args:
            wanted: only these; ``None`` is all.
            cut: what is wanted of each: a view of it; nothing else is read. ``None`` is all.
        """
        for name, tensor in self.tensors.items():
            if wanted is None or name in wanted:
                yield name, cut_and_read(name, tensor, cut)

    def read(self) -> dict[str, Tensor]:
        """All parameters, a tied head among them."""
        state = dict(self.stream())
        if self.config.tie_word_embeddings:
            state[HEAD] = state[EMBEDDING]
        return state


def megatron_tensors(theirs: Mapping[str, Tensor], config: MegatronModelConfig, where: str) -> NamedTensors:
    """Megatron's tensors as ours.

    Raises:
        CheckpointError: tensors are missing, left over or of other shapes; which is said.
    """
    layers = {name for name in theirs if not name.endswith("_extra_state")}
    ours, used = to_ours(theirs, config)
    used |= {"output_layer.weight"} if config.tie_word_embeddings else set()
    with torch.device("meta"):
        expected = {
            name: tuple(item.shape) for name, item in MegatronLmDecoder(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        del expected[HEAD]
    problems = [f"{name} is missing" for name in expected if name not in ours]
    problems += [f"tensor {name} belongs to no parameter" for name in sorted(layers - used)]
    problems += [f"{name} belongs to no parameter" for name in ours if name not in expected]
    problems += [
        f"{name} has the shape {list(ours[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in ours and tuple(ours[name].shape) != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{where}: the weights do not fit Megatron's options: {shown}.")
    return NamedTensors(config, ours)
