"""What ranks run to show what replicas hold and send."""

from __future__ import annotations

import gc
from typing import Any

import torch
from tests.parallel.workers import SEED, make_batches, mesh_of, share_of, whole
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtnlg.config import MegatronModelConfig, OptimizerConfig, PrecisionConfig
from mtnlg.parallel import float8, lay_out, replicas
from mtnlg.training.loss_scale import LossScale
from mtnlg.training.optimizers import Optimizer
from mtnlg.training.step import TrainingStep

# Every dimension divides by 4, so that no message is padded; the layers are most of it.
MODEL = dict(
    vocab_size=32, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=16
)
MICRO_BATCHES = 3


class Messages(TorchDispatchMode):
    """Records every collective: its kind, dtype and elements of what it starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.split(".")[0]
        if function.namespace == "c10d":
            tensors = args[0] if name.startswith("allreduce") else args[1]
            first = tensors[0] if isinstance(tensors, (list, tuple)) else tensors
            self.sent.append((name.strip("_"), first.dtype, first.numel()))
        return function(*args, **(kwargs or {}))

    def elements(self, kind: str) -> dict[torch.dtype, int]:
        """Elements by dtype of all large messages of a kind (losses and counts are small)."""
        found: dict[torch.dtype, int] = {}
        for name, dtype, count in self.sent:
            if kind in name and count > 8:
                found[dtype] = found.get(dtype, 0) + count
        return found


def held_bytes() -> int:
    """Bytes of all tensors that Python knows of."""
    gc.collect()  # what is dead counts neither before nor after
    sizes = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            local = item._local_tensor if issubclass(type(item), DTensor) else item
            if local.device.type == "cpu" and not hasattr(local, "elem"):
                storage = local.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def hold_and_send(layout: dict[str, Any], precision: dict[str, Any]) -> dict[str, Any]:
    """Bytes held at three moments and elements sent in one step, per parameter of the model."""
    config, mesh = MegatronModelConfig(**MODEL), mesh_of(layout)
    before = held_bytes()
    model = lay_out(config, mesh, SEED, PrecisionConfig(**precision))
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig())
    batches = share_of(make_batches(config.vocab_size, 1, 8, False, MICRO_BATCHES, mesh.num_replicas), mesh)

    def step() -> None:
        model.forward_backward(batches, 10.0)
        optimizer.step(1.0)
        optimizer.zero_grad()

    step()  # buffers are made, and weights have changed
    held: dict[str, list[int]] = {"between micro-batches": [], "in a layer": []}

    def note(moment: str) -> Any:
        return lambda module, inputs: held[moment].append(held_bytes() - before)

    (stage,) = model.stages
    handles = [stage.register_forward_pre_hook(note("between micro-batches"))]
    handles += [stage.decoder.layers["2"].mlp.register_forward_pre_hook(note("in a layer"))]
    with Messages() as messages:
        step()
    for handle in handles:
        handle.remove()
    count = config.num_parameters
    result = {
        "between steps": (held_bytes() - before) / count,
        "between micro-batches": held["between micro-batches"][1] / count,
        "in a layer": max(held["in a layer"]) / count,
    }
    for kind in ("allreduce", "reduce_scatter", "allgather"):
        elements = messages.elements(kind)
        result[kind] = {str(dtype): number / count for dtype, number in elements.items()}
    result["layers"] = 1.0 - (MODEL["vocab_size"] + 18) * MODEL["hidden_size"] / count
    return result


def when_messages_leave(sharding: str) -> tuple[int, int]:
    """Messages that have left when the last gradient of the last backward pass comes, and all of them."""
    usual, replicas.BUCKET_BYTES = replicas.BUCKET_BYTES, 4096
    try:
        config = MegatronModelConfig(**MODEL)
        mesh = mesh_of({"data_parallel_size": 2, "data_parallel_sharding": sharding})
        model = lay_out(config, mesh, SEED)
        batches = share_of(make_batches(config.vocab_size, 1, 8, False, MICRO_BATCHES, 2), mesh)
        left: list[int] = []
        with Messages() as messages:
            embedding = model.stages[0].decoder.embedding.tokens.weight
            embedding.register_hook(lambda gradient: left.append(len(messages.sent)))
            model.forward_backward(batches, 10.0)
        assert left[:-1] == [0] * (MICRO_BATCHES - 1), "nothing is sent before the last micro-batch"
        return left[-1], len(messages.sent)
    finally:
        replicas.BUCKET_BYTES = usual


def small_steps(layout: dict[str, Any], precision: dict[str, Any]) -> dict[str, Any]:
    """64 steps of 2^-12 on every weight, which bf16 cannot hold beside 1."""
    config, mesh = MegatronModelConfig(**MODEL), mesh_of(layout)
    model = lay_out(config, mesh, SEED, PrecisionConfig(**precision))
    batches = share_of(make_batches(config.vocab_size, 1, 8, False, 4, mesh.num_replicas), mesh)
    gradients = set()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.fill_(1.0)
    for _ in range(64):
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                parameter += 2.0**-12
    model.forward_backward(batches, 10.0)
    gradients = {str(item.grad.dtype) for _, item in model.named_parameters() if item.grad is not None}
    values = {float(value) for item in model.state_dict().values() for value in whole(item).unique()}
    model.evaluate(batches[:1])
    working = {
        (str(local(item).dtype), float(value))
        for stage in model.stages
        for item in stage.parameters()
        for value in local(item).unique()
    }
    return {"masters": values, "gradients": gradients, "working": working}


def local(parameter: nn.Parameter) -> torch.Tensor:
    return (parameter._local_tensor if isinstance(parameter, DTensor) else parameter).detach()


def overflow_on_one_rank(layout: dict[str, Any], rank: int) -> list[Any]:
    """Three steps in fp16, of which the second overflows on one rank only."""
    config, mesh = MegatronModelConfig(**MODEL), mesh_of(layout)
    precision = PrecisionConfig(dtype="fp16", initial_loss_scale=256.0, loss_scale_window=2)
    model = lay_out(config, mesh, SEED, precision)
    optimizer, scale = Optimizer(model.named_parameters(), OptimizerConfig()), LossScale(precision)
    step = TrainingStep(model, optimizer, OptimizerConfig(), scale, max_skipped=0)
    batches = make_batches(config.vocab_size, 1, 8, False, 4, mesh.num_replicas)
    found: list[Any] = []
    for number in range(4):
        before = sum(float(whole(item).abs().sum()) for item in model.state_dict().values())
        handle = None
        if number == 1 and mesh.rank == rank:
            block = next(iter(model.stages[0].decoder.layers.values())).mlp
            handle = block.register_forward_hook(overflow)
        outcome = step.run(share_of(batches, mesh), 10, 1.0)
        if handle is not None:
            handle.remove()
        after = sum(float(whole(item).abs().sum()) for item in model.state_dict().values())
        found.append((outcome.applied, scale.value, before != after))
    resumed = LossScale(precision)
    resumed.load_state(scale.state())
    return [*found, (resumed.value, resumed.good_steps) == (scale.value, scale.good_steps)]


def overflow(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * float("inf"))


def float8_step(layout: dict[str, Any], fp8: bool) -> dict[str, Any]:
    """Loss and gradients of one step with torchao's 8-bit arithmetic, emulated."""
    float8.EMULATE = True
    try:
        config, mesh = MegatronModelConfig(**MODEL), mesh_of(layout)
        model = lay_out(config, mesh, SEED, PrecisionConfig(dtype="bf16", fp8=fp8))
        batches = make_batches(config.vocab_size, 1, 8, False, 2, 2)
        loss = mesh.sum_of_loss(model.forward_backward(share_of(batches, mesh), 10.0))
        return {
            "loss": float(loss),
            "gradients": {name: whole(item.grad).numpy() for name, item in model.named_parameters()},
            "weights": {name: whole(item).numpy() for name, item in model.state_dict().items()},
        }
    finally:
        float8.EMULATE = False


def gathers_under_way() -> list[int]:
    """Gathers that are still under way when the first layer, and when the head, has its weights."""
    usual, replicas.BUCKET_BYTES = replicas.BUCKET_BYTES, 4096
    try:
        config, mesh = MegatronModelConfig(**MODEL), mesh_of({"data_parallel_size": 2})
        model = lay_out(config, mesh, SEED)
        batches = share_of(make_batches(config.vocab_size, 1, 8, False, 1, 2), mesh)
        model.state_dict()  # after which weights may have changed
        decoder = model.stages[0].decoder
        counts: list[int] = []
        for block in (decoder.layers["0"], decoder.head):
            block.register_forward_pre_hook(
                lambda module, inputs: counts.append(len(model._keeper._arriving))
            )
        model.forward_backward(batches, 10.0)
        return counts
    finally:
        replicas.BUCKET_BYTES = usual
