"""Checkpoints by DeepSpeed itself, on the CPU; runs in an environment of its own, without mtnlg.

    python deepspeed_peer.py RANKS < '[{"weights": FILE, "out": DIR, "stage": 2, "precision": "fp32"}]'

Trains parameters of these names and shapes two steps, saves them in DIR, and puts beside it, in
``DIR.safetensors``, what DeepSpeed's own ``zero_to_fp32`` makes of DIR (without ZeRO: the module's own).
More of a task: ``zero`` (settings of ZeRO), ``frozen`` and ``buffers`` (names that are not trained),
``tied`` ({name: name of the same tensor}), ``data_types``, ``megatron`` (its options, names nested as
Megatron-DeepSpeed nests them).
DeepSpeed's own kernels would be compiled first; none is needed for this, so none is built.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "CUDA_VISIBLE_DEVICES": ""}
import torch
from safetensors.torch import load_file, save_file
from torch import nn


class Branch(nn.Module):
    """A node of the tree of names; its result needs every parameter below it."""

    def forward(self, x):
        for tensor in self.parameters(recurse=False):
            x = x + (tensor.float() - 0.3).square().mean().to(x.dtype)
        for child in self.children():
            x = child(x)
        return x


class Root(Branch):
    is_megatron = False

    def state_dict(self, *arguments, **named):
        state = super().state_dict(*arguments, **named)
        if not self.is_megatron or arguments or named.get("prefix"):
            return state
        nested = {}
        for name, tensor in state.items():
            *sections, rest = name.split(".", 2)
            if sections[1] == "embedding":
                *more, rest = rest.split(".")
                sections += more
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[rest] = tensor
        return nested


def module_of(task):
    root = Root()
    root.is_megatron = "megatron" in task
    tensors = load_file(task["weights"])
    made = {}
    for name, tensor in tensors.items():
        branch, leaf = below(root, name)
        if name in task.get("buffers", ()):
            branch.register_buffer(leaf, tensor)
        else:
            made[name] = nn.Parameter(tensor, requires_grad=name not in task.get("frozen", ()))
            branch.register_parameter(leaf, made[name])
    for name, other in task.get("tied", {}).items():
        branch, leaf = below(root, name)
        branch.register_parameter(leaf, made[other])
    return root


def below(branch, name):
    *path, leaf = name.split(".")
    for part in path:
        if part not in branch._modules:
            branch.add_module(part, Branch())
        branch = branch._modules[part]
    return branch, leaf


def save(task, deepspeed, rank):
    module = module_of(task)
    trained = [tensor for tensor in module.parameters() if tensor.requires_grad]
    groups = [dict(params=[t for t in trained if t.dim() > 1], weight_decay=0.1)]
    groups.append(dict(params=[t for t in trained if t.dim() <= 1], weight_decay=0.0))
    zero = {"stage": task["stage"], "stage3_param_persistence_threshold": 20, **task.get("zero", {})}
    settings = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
        "bf16": {"enabled": task["precision"] == "bf16"},
    }  # fmt: skip
    settings |= {"data_types": task.get("data_types", {})}
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=settings
    )
    for _ in range(2):
        dtype = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
        engine.backward(engine(torch.ones((), dtype=dtype) * (rank + 1)))
        engine.step()
    megatron = task.get("megatron")
    state = {"args": argparse.Namespace(**megatron), "checkpoint_version": 3.0} if megatron else {}
    engine.save_checkpoint(task["out"], tag="global_step2", client_state=state)
    torch.distributed.barrier()
    live = trained_weights(engine)
    if rank == 0:
        save_file(consolidated(task, engine, live), task["out"] + ".safetensors")
    torch.distributed.barrier()
    engine.destroy()


def trained_weights(engine):
    """The optimizer's float32 weights while it lives; every rank has to ask."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {name: safe_get_full_fp32_param(tensor) for name, tensor in engine.module.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items() if tensor is not None}


def consolidated(task, engine, live):
    if task["stage"] == 0:
        whole = nn.Module.state_dict(engine.module)
    elif task.get("data_types"):  # its bf16 optimizer's files name no stage: zero_to_fp32 refuses them
        whole = live
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        whole = get_fp32_state_dict_from_zero_checkpoint(task["out"])
    return {name: tensor.detach().clone().contiguous() for name, tensor in whole.items()}


def work(rank, ranks, meeting, tasks):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611",
    }  # fmt: skip
    torch.set_num_threads(1)
    import deepspeed
    import deepspeed.comm.ccl
    import deepspeed.comm.torch

    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.comm.torch.build_shm_op = deepspeed.comm.ccl.build_ccl_op = lambda: None
    deepspeed.init_distributed(
        dist_backend="gloo", init_method=f"file://{meeting}/ranks", rank=rank, world_size=ranks
    )
    for task in tasks:
        save(task, deepspeed, rank)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (int(sys.argv[1]), meeting, json.load(sys.stdin))
        torch.multiprocessing.spawn(work, arguments, nprocs=int(sys.argv[1]))
