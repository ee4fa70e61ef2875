"""What activations take: measured on a layer of any layout, and computed beside the literature.

Korthikanti et al. 2022 (arXiv 2205.05198) count 16-bit activations with dropout after attention, in
attention and after the MLP, attention weights kept whole. What is kept here differs: elements of any
size, no mask where nothing is dropped, attention weights under the diagonal only (on a CPU) or not at
all (a GPU's fused kernels), and, with sequence parallelism, the gathered inputs of the split matrices,
which are gathered again only where ``normalization`` is recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mtnlg.config import LayoutConfig, MegatronModelConfig, PrecisionConfig, TrainingConfig
from mtnlg.parallel.activation_budget import FULL, Level
from mtnlg.parallel.activation_meter import ActivationMeter
from mtnlg.parallel.apply import lay_out
from mtnlg.parallel.cpu_attention import BLOCK
from mtnlg.parallel.mesh import Mesh, build_mesh
from mtnlg.tokens.batch import Batch


@dataclass(frozen=True)
class LayerShape:
    """What the formulas are about: a layer of GPT's kind, without dropout.

    Args:
        batch: sequences of a micro-batch.
        sequence: tokens of each.
        hidden: size of the residual stream.
        heads: of attention, as many for keys and values.
        ffn: width of the MLP.
        tensor: tensor-parallel ranks.
        sequence_parallel: whether they split the sequence between blocks.
    """

    batch: int
    sequence: int
    hidden: int
    heads: int
    ffn: int
    tensor: int = 1
    sequence_parallel: bool = True

    @property
    def between(self) -> int:
        """Parts that activations between blocks are in."""
        return self.tensor if self.sequence_parallel else 1


def korthikanti(shape: LayerShape, what: str) -> float:
    """Bytes of one layer's activations by Korthikanti et al., tables 2 and 4 (``ffn`` is 4 hidden).

    Args:
        shape: of the layer.
        what: ``none``, ``selective`` or ``full`` recomputation.
    """
    s, b, h, t = shape.sequence, shape.batch, shape.hidden, shape.tensor
    weights = 0.0 if what == "selective" else 5.0 * shape.heads * s / h
    if what == "full":
        return 2.0 * s * b * h
    if shape.sequence_parallel:
        return s * b * h / t * (34.0 + weights)
    return s * b * h * (10.0 + (24.0 + weights) / t)


def layer_bytes(
    shape: LayerShape, operators: Level, element_size: int = 4, keeps_weights: bool = True
) -> int:
    """Bytes of one layer's activations here.

    Args:
        shape: of the layer.
        operators: that are computed again; see :mod:`mtnlg.parallel.recompute`.
        element_size: bytes of an activation.
        keeps_weights: whether the attention kernel keeps its weights: on a CPU, those of blocks of
            queries by all keys that the block may see.
    """
    tokens, stream = shape.sequence * shape.batch, shape.sequence * shape.batch * shape.hidden
    if operators == FULL:
        return stream * element_size // shape.between
    recomputes_attention = bool(operators & {"attention", "linear"})
    elements = 2 * stream / shape.between  # the residual stream before each of the two norms
    elements += stream / shape.tensor  # what goes into attention's last matrix
    if "normalization" not in operators:
        elements += 2 * stream  # what goes into the first matrices, gathered
    if "activation" not in operators:
        elements += tokens * shape.ffn / shape.tensor
    if "linear" not in operators:
        elements += 3 * stream / shape.tensor + tokens * shape.ffn / shape.tensor
    if keeps_weights and not recomputes_attention:
        starts = range(0, shape.sequence, BLOCK)
        rows = [min(BLOCK, shape.sequence - start) for start in starts]
        seen = sum(count * (start + count) for start, count in zip(starts, rows))
        elements += shape.batch * shape.heads * seen / shape.tensor
    statistics = 4 * 2 * 2 * tokens // shape.between  # mean and deviation of two norms, in float32
    return round(elements * element_size) + statistics


def measure_layers(
    config: MegatronModelConfig,
    mesh: Mesh,
    switches: TrainingConfig,
    batch: int,
    sequence: int,
    precision: PrecisionConfig | None = None,
) -> list[int]:
    """Bytes that each layer of this rank holds between its forward and its backward pass.

    Each is counted with its result, which is the next layer's input, and without its own.

    Args:
        config: the architecture; without pipeline parallelism.
        mesh: this rank's place.
        switches: what is recomputed.
        batch: sequences of the micro-batch.
        sequence: tokens of each.
        precision: number formats.
    """
    model = lay_out(config, mesh, precision=precision, switches=switches)
    (stage,) = model.stages
    ids = torch.arange(batch * sequence, device=mesh.device).view(batch, sequence) % config.vocab_size
    model.forward_backward([Batch(ids, ids)], float(ids.numel()))  # a budget looks at the shapes first
    meters: list[ActivationMeter] = []

    def begin(*_: object) -> None:
        meters.append(ActivationMeter())
        meters[-1].__enter__()

    def end(*_: object) -> None:
        meters[-1].__exit__(None, None, None)

    for layer in stage.decoder.layers.values():
        layer.register_forward_pre_hook(begin)
        layer.register_forward_hook(end)
    loss = stage(ids, ids)
    held = [meter.bytes for meter in meters]
    loss.backward()
    return held


def measure_on_rank(
    config: MegatronModelConfig,
    layout: LayoutConfig,
    switches: list[TrainingConfig],
    batch: int,
    sequence: int,
) -> list[list[int]]:
    """:func:`measure_layers` for each of ``switches`` on one of the ranks of ``layout``, on a CPU."""
    mesh = build_mesh(layout)
    return [measure_layers(config, mesh, each, batch, sequence) for each in switches]
