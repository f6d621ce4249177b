"""`--sharding fsdp2`: parameters, gradients and optimizer state of the draft are sharded over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from specforge_lite.model.draft import Draft
from specforge_lite.training.distributed import World
from specforge_lite.training.parallel import ReplicatedDraft, check_shape
from specforge_lite.training.settings import DistributedSection


class ShardedDraft(ReplicatedDraft):
    """FSDP2. Importing torch's takes as long as importing torch, so this module is imported where it is chosen."""

    def __init__(self, draft: Draft, world: World, config: DistributedSection, compute_dtype: torch.dtype) -> None:
        self._world, self.draft = world, draft
        self._mesh = init_device_mesh(world.device.type, (world.world_size,))
        if not config.cpu_offload:
            draft.to(world.device)
        precision = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
        fully_shard(draft, mesh=self._mesh, mp_policy=precision, offload_policy=offload)
        for name, buffer in draft.named_buffers():
            path, _, leaf = name.rpartition(".")
            owner = draft.get_submodule(path)
            persistent = leaf not in owner._non_persistent_buffers_set
            owner.register_buffer(leaf, buffer.to(world.device), persistent=persistent)
        draft.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # sums, not means
        draft.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no pre-multiplied sum
        self._dtensors = {n: p for n, p in draft.named_parameters() if p.requires_grad and isinstance(p, DTensor)}
        # The optimizer sees plain local tensors: the update is element-wise, and DTensor dispatch costs host time.
        with torch.no_grad():
            self.parameters = {n: nn.Parameter(p.to_local()) for n, p in self._dtensors.items()}

    def begin_step(self) -> None:
        for parameter in self._dtensors.values():
            parameter.grad = None

    def backward(self, loss: Tensor, last: bool) -> None:
        self.draft.set_requires_gradient_sync(last)  # type: ignore[operator]
        super().backward(loss, last)

    @torch.no_grad()
    def reduce_gradients(self) -> Tensor:
        squares = []
        for name, parameter in self._dtensors.items():
            assert parameter.grad is not None, f"{name} got no gradient"
            local: Tensor = parameter.grad.to_local()  # type: ignore[attr-defined]
            self.parameters[name].grad = local
            squares.append(local.square().sum())
        return self._world.sum_(torch.stack(squares).sum())

    @torch.no_grad()
    def full(self, name: str, tensor: Tensor) -> Tensor:
        like, local = self._dtensors[name], tensor.detach().to(self._world.device)
        shard = DTensor.from_local(
            local, self._mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
        return shard.full_tensor().cpu()

    @torch.no_grad()
    def load(self, name: str, tensor: Tensor, full: Tensor) -> None:
        like = self._dtensors[name]
        check_shape(name, like.shape, full)
        whole = full.to(self._world.device, tensor.dtype)
        shard = distribute_tensor(whole, self._mesh, like.placements, src_data_rank=None)
        tensor.copy_(shard.to_local())

    def frozen(self) -> dict[str, Tensor]:
        whole = super().frozen()
        return {n: t.full_tensor().cpu() if hasattr(t, "full_tensor") else t for n, t in whole.items()}

    def checksum(self) -> int | None:
        return None
