"""FSDP2: the draft's parameters, gradients and optimizer state sharded over ranks (`--sharding fsdp2`).

A module of its own, because importing torch's FSDP and DTensor takes as long as importing torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from specforge_lite.model.draft import Draft
from specforge_lite.training.distributed import World
from specforge_lite.training.parallel import ParallelDraft, check_shape, frozen_tensors
from specforge_lite.training.settings import DistributedSection


class ShardedDraft(ParallelDraft):
    """FSDP2: parameters, gradients and optimizer state of the draft are sharded over all ranks."""

    def __init__(self, draft: Draft, world: World, config: DistributedSection, compute_dtype: torch.dtype) -> None:
        self._world = world
        self._mesh = init_device_mesh(world.device.type, (world.world_size,))
        if not config.cpu_offload:
            draft.to(world.device)
        fully_shard(
            draft,
            mesh=self._mesh,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            offload_policy=CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy(),
        )
        for name, buffer in draft.named_buffers():
            _set_buffer(draft, name, buffer.to(world.device))
        self.draft = draft
        self._root: nn.Module = draft
        draft.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # sums, not means
        draft.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no pre-multiplied sum
        self._dtensors: dict[str, DTensor] = {
            name: p for name, p in draft.named_parameters() if p.requires_grad and isinstance(p, DTensor)
        }
        # The optimizer sees plain local tensors: the update is element-wise, and DTensor dispatch costs host time.
        with torch.no_grad():
            self.parameters = {n: nn.Parameter(p.to_local()) for n, p in self._dtensors.items()}

    def begin_step(self) -> None:
        for parameter in self._dtensors.values():
            parameter.grad = None

    def backward(self, loss: Tensor, last: bool) -> None:
        self._root.set_requires_gradient_sync(last)  # type: ignore[operator]
        loss.backward()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def reduce_gradients(self) -> Tensor:
        squares = []
        for name, parameter in self._dtensors.items():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor), f"{name} got no gradient"
            local = gradient.to_local()
            self.parameters[name].grad = local
            squares.append(local.square().sum())
        return self._world.sum_(torch.stack(squares).sum())

    @torch.no_grad()
    def full(self, name: str, tensor: Tensor) -> Tensor:
        like = self._dtensors[name]
        shard = DTensor.from_local(
            tensor.detach().to(self._world.device),
            self._mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
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
        whole = {}
        for name, tensor in frozen_tensors(self.draft).items():
            whole[name] = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        return whole


def _set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    persistent = leaf not in owner._non_persistent_buffers_set
    owner.register_buffer(leaf, value, persistent=persistent)
