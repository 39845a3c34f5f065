"""Data parallel training: low-rank gradients and the statistics of bases are what travels between ranks.

    sync = oasis_fx.distributed.prepare(model)          # before it is wrapped
    model = DistributedDataParallel(model)              # keeps all other parameters; its no_sync() holds for ours too

Weights of two dimensions and more are taken out of DDP's buckets: their gradients, m x r where DDP would send m x n,
are averaged here, in buckets of their own, as soon as each is complete, while the backward pass goes on. Statistics
C [n, r] and energies follow at its end. All ranks then take one step and move their bases alike, bit by bit.

Gradients are averaged over ranks, as DDP's are: with equal numbers of tokens the joint batch has their mean.

FSDP2 is the other way about, `prepare` comes after it (`oasis_fx.distributed.sharding`):

    for block in model.layers:
        fully_shard(block)
    fully_shard(model)
    sync = oasis_fx.distributed.prepare(model)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from oasis_fx._old_names import renamed
from oasis_fx._torch.distributed import leave_to_us
from oasis_fx.distributed.gradient_sync import GradientSync
from oasis_fx.distributed.sharding import prepare_shards

BUCKET_BYTES = 25 * 2**20  # DDP's default


def prepare(
    model: torch.nn.Module, group: dist.ProcessGroup | None = None, *, bucket_bytes: int = BUCKET_BYTES
) -> GradientSync:
    """Take over the averaging of a model's weights from `DistributedDataParallel`, which has to wrap it afterwards.

    The weights are made equal to those of rank 0. Weights that are frozen now are averaged once they are thawed, the
    model may be wrapped anew, and a second call takes the place of the first. For a model that is already under FSDP2
    (`fully_shard`), low-rank gradients are taken over from FSDP2.

    Args:
        model: a model that is not yet wrapped by DistributedDataParallel, or already under `fully_shard`; compiled or
            not.
        group: the group of processes, or None for all. A model under FSDP2 has its own.
        bucket_bytes: size of a bucket in bytes, at least 1. A bucket of gradients is sent as soon as it is full.

    Raises:
        ValueError: ``model`` is a DistributedDataParallel already, ``bucket_bytes`` is no such number, or `fully_shard`
            was given a mesh of several dimensions.
        RuntimeError: torch.distributed is not initialised.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model is a DistributedDataParallel: call prepare() on the model before wrapping it")
    if not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes!r}: it must be a whole number from 1")
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call init_process_group() first")
    sharded = prepare_shards(model, bucket_bytes)
    if sharded is not None:
        return sharded
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if p.dim() >= 2]
    leave_to_us(model, (name for name, _ in named))
    weights = list({p: None for _, p in named if _can_have_gradient(p)})  # frozen ones too: they may be thawed
    with torch.no_grad():
        for _, parameter in named:
            dist.broadcast(parameter.detach(), group_src=0, group=group)
    return GradientSync(weights, group, bucket_bytes)


def _can_have_gradient(parameter: torch.nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


__getattr__ = renamed(__name__, {"synchronize": "prepare"})
