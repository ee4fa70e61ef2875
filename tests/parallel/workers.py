"""What tests run on ranks."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtnlg.config import LayoutConfig, MegatronModelConfig
from mtnlg.parallel import ParallelModel, build_mesh, lay_out
from mtnlg.tokens.batch import IGNORED_LABEL, Batch

SEED = 7


def sum_of_ranks(start: int) -> int:
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    return start + int(total)


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


def hang_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def make_batches(
    vocab_size: int, rows: int, sequence: int, documents: bool, micro_batches: int, replicas: int
) -> list[list[Batch]]:
    """Micro-batches of each replica: masked labels of unequal counts, documents if asked for."""
    generator = torch.Generator().manual_seed(11)
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
            mine.append(batch)
        made.append(mine)
    return made


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(model: ParallelModel) -> dict[str, Any]:
    return {
        name: whole(parameter.grad).detach().numpy().copy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def one_step(
    model_fields: dict[str, Any],
    layout_fields: dict[str, Any],
    data_fields: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Loss, gradients and norm of one step, and the first weights, of this rank's part."""
    config = MegatronModelConfig(**model_fields)
    mesh = build_mesh(LayoutConfig(**layout_fields))
    model = lay_out(config, mesh, seed=SEED, **options)
    weights = {name: whole(item).detach().numpy().copy() for name, item in model.named_parameters()}
    batches = make_batches(config.vocab_size, **data_fields)
    valid = sum(batch.num_valid_tokens for replica in batches for batch in replica)
    per_replica = len(batches) // mesh.num_replicas
    mine = [
        batch
        for replica in batches[mesh.replica * per_replica : (mesh.replica + 1) * per_replica]
        for batch in replica
    ]
    loss = mesh.sum_over_stages_and_replicas(model.forward_backward(mine, valid))
    evaluated, counted = model.evaluate(mine)
    return {
        "loss": loss.item(),
        "evaluated": evaluated.item(),
        "counted": counted.item(),
        "valid": valid,
        "norm": model.gradient_norm().item(),
        "gradients": whole_gradients(model),
        "weights": weights,
    }
