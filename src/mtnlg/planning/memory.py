"""What the fullest rank of a layout must hold, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from mtnlg.config import LayoutConfig, MegatronModelConfig, PrecisionConfig, TrainingConfig
from mtnlg.config.division import layers_of_stages

MASTER_BYTES = 4  # a float32 weight
ADAMW_BYTES = 8  # two float32 moments of it
GRADIENT_BYTES = 4
# Korthikanti et al. 2022 (arXiv 2205.05198), equation 1: a layer keeps 34 bytes for each element of its
# input in 16 bits. Of them 2 are dropout's masks and 32 are sixteen 16-bit numbers. Their further term
# for attention scores is not kept here: attention is computed in blocks.
NUMBERS_PER_ELEMENT = 16
MASK_BYTES_PER_ELEMENT = 2
# Cross attention keeps five more for each element of the target (its norm's and its queries' inputs, the
# queries, what it gives, and the stream), and its keys and values of the source.
CROSS_NUMBERS_PER_ELEMENT = 5
# Equation 2: of 34, tensor parallelism alone leaves 10 (norms, dropouts, inputs) whole on each rank.
WHOLE_SHARE = 10 / 34


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of the fullest rank.

    Args:
        weights: as computed with, and the rank's part of float32 masters.
        gradients: as they are added up, and the rank's part of their sum.
        optimizer: the rank's part of AdamW's moments.
        activations: kept between forward and backward passes.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_of_rank(
    layout: LayoutConfig,
    model: MegatronModelConfig,
    sequence_length: int,
    micro_batch_size: int,
    micro_batches: int,
    precision: PrecisionConfig,
    training: TrainingConfig,
    target_length: int = 0,
) -> MemoryNeed:
    """What the fullest rank of ``layout`` holds, bytes.

    Args:
        layout: its ``data_parallel_size`` known.
        model: the architecture.
        sequence_length: tokens of a sample.
        micro_batch_size: samples of a micro-batch.
        micro_batches: of each replica in a step.
        precision: number formats.
        training: recomputation.
        target_length: tokens that an encoder-decoder writes of each sample.
    """
    number = 4 if precision.dtype == "float32" else 2
    parameters = _most_parameters(layout, model)
    shards = layout.shard_size * layout.context_parallel_size
    replicas = (layout.data_parallel_size or 1) * layout.context_parallel_size
    if layout.data_parallel_sharding == "ddp":
        shards = 1
    # Gathered weights and whole gradients stay from the first micro-batch to the last; ZeRO-2 hands
    # gradients on at once, ZeRO-3 and hybrid sharding weights too.
    has_copy = number < 4 or shards > 1
    copy = number * has_copy * (layout.data_parallel_sharding not in ("zero3", "hybrid"))
    fixed = (micro_batches, number, training)
    if model.has_encoder:
        activations = _pair_activations(
            layout, model, micro_batch_size, (sequence_length, target_length), *fixed
        )
    else:
        activations = _activations(layout, model, sequence_length * micro_batch_size, *fixed)
    whole_gradients = layout.data_parallel_sharding in ("ddp", "zero1") and replicas > 1
    return MemoryNeed(
        weights=parameters * (copy + MASTER_BYTES / shards),
        gradients=parameters
        * GRADIENT_BYTES
        * (whole_gradients + 1 / shards * (shards > 1 or not whole_gradients)),
        optimizer=parameters * ADAMW_BYTES / shards,
        activations=activations,
    )


def _most_parameters(layout: LayoutConfig, model: MegatronModelConfig) -> float:
    """Parameters of the fullest rank, before they are shared out over replicas."""
    experts = layout.expert_parallel_size
    ends = model.num_parameters - sum(map(model.num_parameters_of_layer, range(model.total_layers)))
    sizes = [_layers_parameters(model, layers, experts) for layers in layers_of_stages(model, layout)]
    of_ranks = [
        sum(sizes[stage] for stage in layout.stages_of_rank(rank))
        for rank in range(layout.pipeline_parallel_size)
    ]
    table = model.vocab_size * model.embedding_width
    if layout.pipeline_parallel_size > 1:  # the last stage holds a table of its own, tied or not
        of_ranks[0] += ends if model.tie_word_embeddings else ends - table
        of_ranks[-1] += table
    else:
        of_ranks[0] += ends
    return max(of_ranks) / layout.tensor_parallel_size


def _layers_parameters(model: MegatronModelConfig, layers: range, expert_ranks: int) -> float:
    """Parameters of some layers where each rank holds one of ``expert_ranks`` parts of the experts."""
    total = 0.0
    for index in layers:
        whole, active = model.num_parameters_of_layer(index), model.num_active_parameters_of_layer(index)
        total += whole
        if whole > active and model.num_experts is not None:
            experts = (
                (whole - active) * model.num_experts / (model.num_experts - model.num_experts_per_token)
            )
            total -= experts * (1.0 - 1.0 / expert_ranks)
    return total


def _activations(
    layout: LayoutConfig,
    model: MegatronModelConfig,
    tokens: int,
    micro_batches: int,
    number: int,
    training: TrainingConfig,
) -> float:
    """Bytes that the first pipeline rank keeps: 1F1B holds a micro-batch for each stage there."""
    element = NUMBERS_PER_ELEMENT * number + MASK_BYTES_PER_ELEMENT * (model.hidden_dropout > 0.0)
    share = 1.0 / layout.tensor_parallel_size
    if not layout.sequence_parallel:
        share = WHOLE_SHARE + (1.0 - WHOLE_SHARE) * share
    hidden = tokens / layout.context_parallel_size * model.hidden_size  # elements of a layer's input
    layer = hidden * element * share
    in_flight = min(layout.pipeline_parallel_size, micro_batches)
    layers = -(-model.num_hidden_layers // layout.pipeline_parallel_size) * in_flight
    if training.activation_recomputation == "full":
        kept = hidden * number * (share if layout.sequence_parallel else 1.0)
        return layers * kept + layer
    if training.activation_recomputation == "budget":
        layer *= training.activation_memory_budget
    return layers * layer


def _pair_activations(
    layout: LayoutConfig,
    model: MegatronModelConfig,
    rows: int,
    lengths: tuple[int, int],
    micro_batches: int,
    number: int,
    training: TrainingConfig,
) -> float:
    """Bytes that the fullest pipeline rank of an encoder-decoder keeps: rank r of n holds n - r in flight.

    Relative positions are trained: attention with them keeps its scores, [heads, sequence, sequence].
    """
    share = 1.0 / layout.tensor_parallel_size
    between = share if layout.sequence_parallel else WHOLE_SHARE + (1.0 - WHOLE_SHARE) * share
    element = NUMBERS_PER_ELEMENT * number + MASK_BYTES_PER_ELEMENT * (model.hidden_dropout > 0.0)
    source, target = (rows * length * model.hidden_size for length in lengths)
    scores = [rows * model.num_attention_heads * length**2 * number * share for length in lengths]
    read = 2 * rows * lengths[0] * model.key_value_heads * model.head_size * number * share
    encoder = source * element * between + scores[0]
    decoder = target * (element + CROSS_NUMBERS_PER_ELEMENT * number) * between + scores[1] + read
    largest = max(encoder, decoder)
    if training.activation_recomputation == "full":
        encoder, decoder = (
            elements * number * (share if layout.sequence_parallel else 1.0)
            for elements in (source, target)
        )
    else:
        largest = 0.0  # of the layer that is being computed again
    if training.activation_recomputation == "budget":
        encoder, decoder = (kept * training.activation_memory_budget for kept in (encoder, decoder))
    stages = layers_of_stages(model, layout)
    of_ranks = []
    for rank in range(layout.pipeline_parallel_size):
        mine = [index for stage in layout.stages_of_rank(rank) for index in stages[stage]]
        kept = sum(encoder if index < model.num_hidden_layers else decoder for index in mine)
        of_ranks.append(kept * min(layout.pipeline_parallel_size - rank, micro_batches))
    return max(of_ranks) + largest
