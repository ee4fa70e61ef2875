"""What tests run on ranks."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from tests.ranks import device_type
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mtnlg.config import (
    LayoutConfig,
    MegatronModelConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from mtnlg.config.layout import SIZES, V_SCHEDULES
from mtnlg.model import loss as plain_loss
from mtnlg.parallel import Mesh, ParallelModel, build_mesh, lay_out
from mtnlg.parallel.exchange import TensorAxis
from mtnlg.parallel.vocabulary import VocabularyParallelLoss
from mtnlg.tokens.batch import IGNORED_LABEL, Batch
from mtnlg.training import checkpoint_files as files
from mtnlg.training.checkpoints import load_tensors, save_checkpoint
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.step import TrainingStep

SEED = 7


def mesh_of(layout_fields: dict[str, Any]) -> Mesh:
    """The mesh of a layout, its process groups made once for all layouts of these sizes."""
    layout = LayoutConfig(**layout_fields)
    like = replace(layout, data_parallel_sharding="hybrid", data_parallel_shard_size=layout.shard_size)
    if layout.data_parallel_sharding == "ddp":
        like = replace(layout, data_parallel_shard_size=None)
    deciding = [f"{name}_parallel_size" for name in SIZES]
    deciding += ["data_parallel_sharding", "data_parallel_shard_size"]
    if layout.pipeline_schedule in V_SCHEDULES:
        deciding.append("pipeline_schedule")
    mesh = _mesh(tuple((name, getattr(like, name)) for name in deciding))
    return replace(mesh, layout=layout)


@cache
def _mesh(layout_fields: tuple[tuple[str, Any], ...]) -> Mesh:
    return build_mesh(LayoutConfig(**dict(layout_fields)), device_type())


def axes_are_cut_once() -> bool:
    mesh = mesh_of({"tensor_parallel_size": 2, "data_parallel_size": 1})
    names = ("pipeline", "tensor")
    return mesh.axis("tensor") is mesh.axis("tensor") and mesh.axis(*names) is mesh.axis(*names)


def sum_of_ranks(start: int) -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return start + int(total)


def process_id() -> int:
    return os.getpid()


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def make_batches(
    vocab_size: int,
    rows: int,
    sequence: int,
    documents: bool,
    micro_batches: int,
    replicas: int,
    seed: int = 11,
    prefixes: bool = False,
    target: int = 0,
) -> list[list[Batch]]:
    """Micro-batches of each replica: masked labels of unequal counts, documents if asked for.

    With ``prefixes`` a part of each text is read at once; with a ``target`` the batches are those of an
    encoder-decoder that writes so many tokens, the sources of unequal lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    if target:
        return [
            [make_pairs(vocab_size, rows, sequence, target, generator) for _ in range(micro_batches)]
            for _ in range(replicas)
        ]
    made = []
    for replica in range(replicas):
        mine = []
        for index in range(micro_batches):
            ids = torch.randint(0, vocab_size, (rows, sequence + 1), generator=generator)
            labels = ids[:, 1:].clone()
            labels[:, : 1 + (3 * index + 5 * replica) % (sequence - 2)] = IGNORED_LABEL
            batch = Batch(ids[:, :-1].clone(), labels)
            if documents:
                boundary = 1 + (index + replica) % (sequence - 1)
                numbers = (torch.arange(sequence) >= boundary).long().expand(rows, -1).clone()
                batch.document_ids = numbers
                batch.position_ids = torch.arange(sequence) - numbers * boundary
            if prefixes:
                batch.prefix_lengths = torch.randint(0, sequence + 1, (rows,), generator=generator)
            mine.append(batch)
        made.append(mine)
    return made


def make_pairs(vocab_size: int, rows: int, source: int, target: int, generator: torch.Generator) -> Batch:
    """A micro-batch of an encoder-decoder: sources and targets of unequal lengths."""
    ids = torch.randint(0, vocab_size, (rows, source), generator=generator)
    written = torch.randint(0, vocab_size, (rows, target + 1), generator=generator)
    labels = written[:, 1:].clone()
    lengths = torch.randint(1, target + 1, (rows, 1), generator=generator)
    labels[torch.arange(target) >= lengths] = IGNORED_LABEL
    mask = torch.arange(source) < torch.randint(1, source + 1, (rows, 1), generator=generator)
    return Batch(ids, labels, decoder_input_ids=written[:, :-1].clone(), encoder_mask=mask)


def share_of(batches: list[list[Batch]], mesh: Mesh) -> list[Batch]:
    """The micro-batches of this rank's replica."""
    count = len(batches) // mesh.num_replicas
    return [
        batch for replica in batches[mesh.replica * count : (mesh.replica + 1) * count] for batch in replica
    ]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_loss(vocab_size: int, gathers: bool, split_sequence: bool, bytes_at_once: int) -> list[Any]:
    """Loss and gradients over vocabulary shards beside the plain loss, in several chunks of tokens."""
    plain_loss.LOGITS_BYTES = bytes_at_once
    mesh = mesh_of({"tensor_parallel_size": dist.get_world_size(), "data_parallel_size": 1}).axis("tensor")
    axis = TensorAxis(mesh, split_sequence)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 8, 5, generator=generator, requires_grad=True)
    weight = torch.randn(vocab_size, 5, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab_size, (2, 8), generator=generator)
    labels[0, :3] = IGNORED_LABEL
    expected = plain_loss.summed_cross_entropy(hidden, weight, labels)
    expected.backward()
    stream = Shard(1) if split_sequence else Replicate()
    mine = distribute_tensor(hidden.detach(), mesh, [stream]).to_local().requires_grad_()
    split_weight = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    loss_function = VocabularyParallelLoss(axis, gathers)
    with torch.no_grad():
        evaluated = loss_function(mine, split_weight, labels)
    loss = loss_function(mine, split_weight, labels)
    (2.0 * loss).backward()
    gradient = DTensor.from_local(mine.grad, mesh, [stream]).full_tensor()
    return [
        (evaluated - expected).abs().item(),
        (loss - expected).abs().item(),
        (gradient / 2.0 - hidden.grad).abs().max().item(),
        (whole(split_weight.grad) / 2.0 - weight.grad).abs().max().item(),
    ]


def embedded_type(model_fields: dict[str, Any], layout_fields: dict[str, Any]) -> str:
    """The type of what the embedding hands to the first layer."""
    config = MegatronModelConfig(**model_fields)
    model = lay_out(config, mesh_of(layout_fields))
    assert model.decoder.embedding is not None
    ids = torch.zeros(1, 8, dtype=torch.long)
    return type(model.decoder.embedding(ids, ids)).__name__


def dropout_streams(layout: dict[str, Any]) -> list[float]:
    """One random number of step 1, of step 2, and of step 1 again."""
    config = MegatronModelConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    model = lay_out(config, mesh_of(layout))
    numbers = []
    for step in (1, 2, 1):
        model.seed_dropout(2**40, step)
        numbers.append(torch.rand(()).item())
    return numbers


def whole_state(model: ParallelModel, optimizer: Optimizer) -> dict[str, Any]:
    state = {**model.state_dict(), **optimizer.state_dict()}
    return {name: whole(tensor).detach().numpy().copy() for name, tensor in state.items()}


def continue_training(
    model_fields: dict[str, Any],
    layout_fields: dict[str, Any],
    optimizer_fields: dict[str, Any],
    run_dir: str,
    step: int,
    num_steps: int,
) -> dict[str, Any]:
    """Go on from the checkpoint of ``step`` (0: from the beginning), and save after ``num_steps``.

    Returns:
        The state as loaded and as saved, the loss of each step.
    """
    config = MegatronModelConfig(**model_fields)
    mesh = mesh_of(layout_fields)
    model = lay_out(config, mesh, seed=SEED if step == 0 else SEED + 1)  # what is loaded is told apart
    optimizer_config = OptimizerConfig(learning_rate=0.02, muon_learning_rate=0.02, **optimizer_fields)
    optimizer = Optimizer(model.named_parameters(), optimizer_config)
    if step:
        folder = files.checkpoints_dir(run_dir) / files.checkpoint_name(step)
        load_tensors(folder, "weights", model.state_dict(), mesh)
        load_tensors(folder, "optimizer", optimizer.state_dict(), mesh)
        optimizer.steps = step
    loaded = whole_state(model, optimizer)
    training = TrainingStep(model, optimizer, optimizer_config, LossScale(PrecisionConfig()), 0)
    outcomes = []
    for number in range(step, step + num_steps):
        batches = make_batches(config.vocab_size, 2, 8, False, 1, 4, seed=number)
        valid = sum(batch.num_valid_tokens for replica in batches for batch in replica)
        outcomes.append(training.run(share_of(batches, mesh), valid, factor=1.0))
    parts = {"weights": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_checkpoint(run_dir, step + num_steps, parts, {}, mesh)
    return {
        "loaded": loaded,
        "saved": whole_state(model, optimizer),
        "losses": [outcome.loss for outcome in outcomes],
        "norms": [outcome.gradient_norm for outcome in outcomes],
    }
