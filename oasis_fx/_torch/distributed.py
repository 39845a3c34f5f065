"""Private names for training on several ranks: of autograd's engine, `DistributedDataParallel` and FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now is over, as FSDP does."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]


def active_ddp() -> Any:
    """The `DistributedDataParallel` whose forward pass runs now, or None."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()


def leave_to_us(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Tell `DistributedDataParallel`, which will wrap ``model``, to leave these parameters alone as well."""
    ignored = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *names}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))


@dataclass(frozen=True)
class FsdpParameter:
    """A parameter under FSDP2: the one that its optimizer has, and the gathered one that graphs see."""

    sharded: torch.nn.Parameter
    whole: torch.nn.Parameter
    _of_fsdp: Any
    _group_of_fsdp: Any

    @property
    def num_mesh_dims(self) -> int:
        return int(self.sharded.device_mesh.ndim)  # type: ignore[attr-defined]

    @property
    def shard_dim(self) -> int:
        return int(self._of_fsdp.fsdp_placement.dim)

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """Over which it is sharded; None where every rank has all of it."""
        return getattr(self._of_fsdp.mesh_info, "shard_process_group", None)

    @property
    def replicas(self) -> torch.distributed.ProcessGroup | None:
        """Those that have the same shard, under hybrid sharding."""
        return getattr(self._of_fsdp.mesh_info, "replicate_process_group", None)

    @property
    def all_ranks(self) -> list[int]:
        """Those that have a shard of it, replicas included."""
        return self.sharded.device_mesh.mesh.flatten().tolist()  # type: ignore[attr-defined, no-any-return]

    @property
    def gradient_divide_factor(self) -> float | None:
        """By `set_gradient_divide_factor`; None: the number of ranks."""
        return self._group_of_fsdp.gradient_divide_factor  # type: ignore[no-any-return]

    def is_synchronizing(self) -> bool:
        """By `set_requires_gradient_sync` and `set_requires_all_reduce`."""
        whole = self.replicas is None or self._group_of_fsdp.all_reduce_grads
        return bool(self._group_of_fsdp.reduce_grads and whole)


def fsdp_parameters(model: torch.nn.Module) -> list[FsdpParameter]:
    """Of all that `fully_shard` was applied to; gathers each once, since FSDP2 makes gathered parameters then."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    found = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # from torch 2.13 on a list
        module.unshard()
        for group in [group for group in groups if group is not None]:
            for parameter in group.fsdp_params:
                if not parameter.is_dtensor:  # of tensor parallelism
                    found.append(FsdpParameter(parameter.sharded_param, parameter._unsharded_param, parameter, group))
        module.reshard()
    return found


def as_shard(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A DTensor around ``values``, which may be of a subclass, laid out as ``like`` is."""
    from torch.distributed.tensor import DTensor

    return DTensor(values, like._spec, requires_grad=False)  # type: ignore[attr-defined, no-any-return]
