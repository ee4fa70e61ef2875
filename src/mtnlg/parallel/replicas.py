"""Replicas that each compute with whole weights: plain replication and ZeRO-1, in flat buffers.

Every replica adds the gradients of its micro-batches up in float32 buffers. When the last backward
pass has filled a buffer it is summed over the replicas while that pass goes on (Li et al. 2020, arXiv
2006.15704). With ``ddp`` that is an all-reduce, and every replica steps everything. With ``zero1``
(Rajbhandari et al. 2020, arXiv 1910.02054, section 5) it is a reduce-scatter: a replica steps the rows
of each weight that are its part, whose optimizer state it alone has, and one gather a step makes the
weights whole again.

Here FSDP would copy every weight and every gradient once more and wait at every layer for hooks that
have nothing to gather.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from mtnlg.parallel.buckets import Bucket, BucketWeight
from mtnlg.parallel.gradients import local_part
from mtnlg.parallel.mesh import Mesh
from mtnlg.parallel.working_copy import cast, on_gradient

BUCKET_BYTES = 2**25  # of float32 gradients: long messages, and several of them to overlap with


class Replicas:
    """Whole weights on every replica, float32 masters whole (``ddp``) or in parts (``zero1``).

    Args:
        parameters: the model's by canonical name, float32, the same on every replica. Frozen ones are
            their own masters, in the dtype of the computation.
        mesh: this rank's place; weights are shared out over its weight axes (experts over theirs).
        dtype: of the computation; ``None`` is float32, and the masters share the weights' memory.
        reduce_dtype: of gradients on their way.
        device: where masters and their gradients are kept; ``None`` is where the model is.
        shared: names of those that two pipeline stages of this rank use: each brings its gradient.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        shared: Collection[str] = (),
    ) -> None:
        self._mesh, self._reduce_dtype, self._device = mesh, reduce_dtype, device
        self._has_own_masters = dtype is not None or device is not None
        self._buckets: list[Bucket] = []
        masters = {}
        for name, weight in reversed(list(parameters.items())):  # the order of the backward pass
            if weight.requires_grad:
                masters[name] = self._add(weight, 2 if name in shared else 1)
        self.masters = {name: masters.get(name, weight) for name, weight in parameters.items()}
        if self._has_own_masters:
            for weight in parameters.values():
                cast(weight, dtype or torch.float32)
        for bucket in self._buckets:
            for item in bucket.weights:
                if item.weight.requires_grad:
                    on_gradient(item.weight, partial(self._take, bucket, item))
        self._versions = self._master_versions()
        self._arriving: list[Bucket] = []
        self._waits_in_forward = False
        self._num_passes = 1
        self._launched = 0
        self._earlier: list[tuple[nn.Parameter, Tensor]] = []

    def begin(self, num_passes: int) -> None:
        """A step of ``num_passes`` backward passes begins."""
        self._num_passes, self._launched = num_passes, 0
        self._earlier = [
            (item, item.grad.clone()) for item in self.masters.values() if item.grad is not None
        ]
        for item in self._weights():
            item.passes = 0

    def collect(self) -> None:
        """Take gradients that were left at the weights without a hook's being called."""
        for bucket in self._buckets:
            for item in bucket.weights:
                if item.weight.grad is not None:
                    self._take(bucket, item, item.weight)

    @torch.no_grad()
    def finish(self) -> None:
        """Sum what is left to sum, wait, and leave the gradients at the masters."""
        self.collect()
        for bucket in self._buckets[self._launched :]:
            bucket.send_gradients(self._reduce_dtype)
        self._launched = len(self._buckets)
        for bucket in self._buckets:
            self._land(bucket)
        for master, gradient in self._earlier:
            assert master.grad is not None
            master.grad += gradient
        self._earlier = []

    @torch.no_grad()
    def refresh(self) -> None:
        """Begin to make the model's weights whole again, unless nothing has written to the masters.

        The first modules of the forward pass need not wait for the weights of the last: see
        :meth:`wait_before`. Without it this method waits itself.
        """
        if self._master_versions() == self._versions:
            return
        self._wait_for(self._arriving)
        for bucket in reversed(self._buckets):  # the order of the forward pass
            if bucket.num_parts > 1:
                bucket.send_weights()
                self._arriving.append(bucket)
            elif self._has_own_masters:
                weights = [local_part(item.weight.detach()) for item in bucket.weights]
                torch._foreach_copy_(weights, [local_part(item.master.detach()) for item in bucket.weights])
        if not self._waits_in_forward:
            self._wait_for(self._arriving)
        self._versions = self._master_versions()

    def wait_before(self, modules: Iterable[nn.Module]) -> None:
        """Let each of ``modules``, which together hold all weights, wait for its own when it runs."""
        homes = {id(item.weight): bucket for bucket in self._buckets for item in bucket.weights}
        for module in modules:
            trained = [weight for weight in module.parameters() if weight.requires_grad]
            needed = list(dict.fromkeys(homes[id(weight)] for weight in trained))
            module.register_forward_pre_hook(partial(self._before, needed))
        self._waits_in_forward = True

    def expect_writes(self) -> None:
        """Gather at the next :meth:`refresh` whatever the masters know of."""
        self._versions = []

    def _before(self, needed: list[Bucket], module: nn.Module, inputs: object) -> None:
        if self._arriving:
            self._wait_for([bucket for bucket in self._arriving if bucket in needed])

    @torch.no_grad()
    def _wait_for(self, buckets: list[Bucket]) -> None:
        for bucket in list(buckets):
            bucket.land_weights(skips_own=not self._has_own_masters)
            self._arriving.remove(bucket)

    def _master_versions(self) -> list[int]:
        return [master._version for master in self.masters.values()]

    def _weights(self) -> Iterable[BucketWeight]:
        return (item for bucket in self._buckets for item in bucket.weights)

    def _add(self, weight: nn.Parameter, uses: int) -> nn.Parameter:
        """Give ``weight`` a place in a bucket, and a master."""
        axes = self._axes(weight)
        copies, parts = axes.size(0), axes.size(1)
        assert copies == 1 or parts == 1, "sharding in groups is FSDP's"
        group, index = axes.get_group(1 if parts > 1 else 0), axes.get_local_rank(1)
        last = next((item for item in reversed(self._buckets) if item.group == group), None)
        if last is None or last.width * last.num_parts * 4 >= BUCKET_BYTES:
            last = Bucket(group, index, parts, self._mesh.device)
            self._buckets.append(last)
        part = local_part(weight.detach())
        rows = part.shape[0]
        part_rows = -(-rows // parts)
        first = min(rows, index * part_rows)
        part = part.narrow(0, first, min(part_rows, rows - first))
        if self._has_own_masters:
            part = part.to(self._device or part.device, torch.float32, copy=True)
        master = nn.Parameter(self._divided(weight, part), requires_grad=weight.requires_grad)
        item = BucketWeight(weight, rows, part_rows, last.width, master, uses)
        last.weights.append(item)
        last.width += item.width
        return master

    def _axes(self, weight: Tensor, own: tuple[str, ...] = ()) -> DeviceMesh:
        """The axes over which ``weight`` is copied and parted, and then its ``own``."""
        names = weight.device_mesh.mesh_dim_names or () if isinstance(weight, DTensor) else ()
        kind = "expert" if any(name.startswith("expert") for name in names) else "weight"
        own = tuple(f"{kind}_tensor" if name == "tensor" else name for name in own)
        return self._mesh.axis(f"{kind}_copy", f"{kind}_part", *own)

    def _divided(self, weight: Tensor, part: Tensor) -> Tensor:
        """``part`` as this replica's rows of ``weight``: a DTensor over the replicas too."""
        names: tuple[str, ...] = ()
        own: tuple[Placement, ...] = ()
        split = 1
        if isinstance(weight, DTensor):
            names, own = tuple(weight.device_mesh.mesh_dim_names or ()), tuple(weight.placements)
            for size, placement in zip(weight.device_mesh.shape, own):
                split *= size if getattr(placement, "dim", None) == 0 else 1
        axes = self._axes(weight, names)
        rows: Placement = Replicate()
        if axes.size(1) > 1:
            # Tensor parallelism divides first, so that a replica's rows of all ranks are not neighbours.
            rows = _StridedShard(0, split_factor=split) if split > 1 else Shard(0)
        placements = (Replicate(), rows, *own)
        shape, stride = weight.shape, weight.stride()
        return DTensor.from_local(part, axes, placements, run_check=False, shape=shape, stride=stride)

    @torch.no_grad()
    def _take(self, bucket: Bucket, item: BucketWeight, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        if isinstance(gradient, DTensor) and isinstance(weight, DTensor):
            item.axis = None
            if gradient.placements != weight.placements:
                if all(isinstance(kind, Partial) for kind in gradient.placements):
                    item.axis = gradient.device_mesh  # summed once, after the last pass
                else:
                    gradient = gradient.redistribute(placements=weight.placements)
        bucket.fill(item, local_part(gradient))
        # Buckets leave in one order, which is the same on every replica.
        while self._launched < len(self._buckets) and self._is_full(self._buckets[self._launched]):
            self._buckets[self._launched].send_gradients(self._reduce_dtype)
            self._launched += 1

    def _is_full(self, bucket: Bucket) -> bool:
        trained = [item for item in bucket.weights if item.weight.requires_grad]
        return all(item.passes == item.uses * self._num_passes for item in trained)

    def _land(self, bucket: Bucket) -> None:
        """Wait for one buffer's sum and hand it to the masters."""
        part = bucket.land_gradients()
        if not bucket.gradients or self._device is not None:
            bucket.gradients = [self._gradient(part, item) for item in bucket.weights]
        for item, gradient in zip(bucket.weights, bucket.gradients):
            if item.weight.requires_grad:
                item.master.grad = gradient

    def _gradient(self, flat: Tensor, item: BucketWeight) -> Tensor:
        part = local_part(item.master.detach())
        gradient = flat[item.start : item.start + part.numel()].view(part.shape)
        return self._divided(item.weight, gradient.to(part.device))
