"""FSDP2: low-rank gradients are scattered by rows, so that each rank has those of its shards.

FSDP2 gathers a weight, calls the compiled graph with it, and reduce-scatters what it finds as the gradient of the
gathered parameter. Of rewritten weights it finds nothing: their factors G [m, r] are taken away as soon as they are
complete, reduce-scattered here in buckets, while the backward pass goes on, and become the gradient of the sharded
parameter, a `LowRankGrad` of its rows within a DTensor. Everything else is FSDP2's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from oasis_fx._torch.distributed import FsdpParameter, as_shard, fsdp_parameters
from oasis_fx.distributed.gradient_sync import GradientSync
from oasis_fx.errors import OasisWarning
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces.store import STORE

_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed in torch 2.13


def prepare_shards(model: torch.nn.Module, bucket_bytes: int) -> ShardedSync | None:
    """Take over the low-rank gradients of a model under FSDP2; return None where no part of it is.

    Raises:
        ValueError: its weights are sharded by another dimension than their first, or over a mesh of other dimensions
            than those of sharding and, under hybrid sharding, replicas; or not all over the same ranks.
    """
    parameters = fsdp_parameters(model)
    if not parameters:
        return None
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        known = 1 if parameter.replicas is None else 2
        if parameter.group is None or parameter.num_mesh_dims != known or parameter.shard_dim != 0:
            raise ValueError(
                f"{names.get(parameter.sharded, 'a parameter')}, of shape {tuple(parameter.whole.shape)}, is under "
                f"fully_shard with a mesh of {parameter.num_mesh_dims} dimensions, sharded by dimension "
                f"{parameter.shard_dim}: oasis_fx needs its rows sharded, over one dimension of a mesh, and at most "
                "replicas over another"
            )
    if len({_ranks(parameter) for parameter in parameters}) > 1:
        raise ValueError("fully_shard was given meshes of several sets of ranks: give it one mesh for all of a model")
    return ShardedSync([p for p in parameters if p.whole.dim() >= 2 and p.whole.is_floating_point()], bucket_bytes)


def _ranks(parameter: FsdpParameter) -> tuple[tuple[int, ...], ...]:
    groups = parameter.group, parameter.replicas
    return tuple(tuple(dist.get_process_group_ranks(group)) for group in groups if group is not None)


class ShardedSync(GradientSync):
    """What `oasis_fx.distributed.prepare` returns for FSDP2: it scatters gradients by rows, and averages statistics."""

    peer = "FSDP2"

    def __init__(self, parameters: Sequence[FsdpParameter], bucket_bytes: int) -> None:
        self._parameters = {parameter.whole: parameter for parameter in parameters}
        self._held: dict[torch.nn.Parameter, LowRankGrad] = {}  # summed over micro-batches that were not sent
        super().__init__(list(self._parameters), parameters[0].group if parameters else None, bucket_bytes)
        self._replicas = parameters[0].replicas if parameters else None
        if self._replicas is not None:
            self.ranks *= dist.get_world_size(self._replicas)
            self.replicas = frozenset(parameters[0].all_ranks)
        for parameter in parameters:
            STORE.note_shard(parameter.sharded, parameter.whole)

    def remove(self) -> None:
        """Stop averaging, and forget which weights the shards belong to."""
        for weight in self._hooks:
            STORE.forget_shard(self._parameters[weight].sharded)
        super().remove()

    def _take_over(self, before: GradientSync, weight: torch.nn.Parameter) -> None:
        super()._take_over(before, weight)
        assert isinstance(before, ShardedSync)  # gathered parameters are known to nothing else
        if weight in before._held:
            self._held[weight] = before._held.pop(weight)

    def _reset(self) -> None:
        super()._reset()
        self._leaving: list[tuple[FsdpParameter, LowRankGrad]] = []
        self._scattered: list[tuple[Any, torch.Tensor, list[tuple[FsdpParameter, LowRankGrad]]]] = []

    def _complete(self, weight: torch.nn.Parameter) -> None:
        gradient = weight.grad
        synchronizing = self._parameters[weight].is_synchronizing()
        if synchronizing and any(subspace.statistic is not None for subspace in STORE.all_of(weight)):
            self._begin()
            self._note_statistics(weight)
        if not isinstance(gradient, LowRankGrad):
            return
        if not gradient.is_low_rank or gradient.features[0] != 1:
            self._leave_to_fsdp(weight, gradient)
            return
        weight.grad = None
        held = self._held.get(weight)
        self._held[weight] = gradient if held is None else held.add_(gradient)  # type: ignore[assignment]
        if synchronizing:
            self._begin()
            self._take(weight)

    def _leave_to_fsdp(self, weight: torch.nn.Parameter, gradient: LowRankGrad) -> None:
        if gradient.is_low_rank:
            warnings.warn(
                f"{gradient.subspace.spoken_name}, of shape {tuple(weight.shape)}, is sharded by a dimension that is "
                "not that of its rows: its gradient travels at full size. Use exclude= for it",
                OasisWarning,
                stacklevel=2,
            )
        weight.grad = gradient.to_dense()

    def _late(self) -> list[torch.nn.Parameter]:
        return list(self._held)

    def _take(self, weight: torch.nn.Parameter) -> None:
        gradient, parameter = self._held.pop(weight), self._parameters[weight]
        self._note(gradient.subspace)
        self._sign(weight, gradient.factor, gradient.subspace)
        self._leaving.append((parameter, gradient))
        if sum(g.factor.nbytes for _, g in self._leaving) >= self.bucket_bytes:
            self._scatter()

    @torch.no_grad()
    def _scatter(self) -> None:
        """Start a reduce-scatter of what is complete: of each factor, padded, one part for each rank."""
        by_dtype: dict[torch.dtype, list[tuple[FsdpParameter, LowRankGrad]]] = {}
        for parameter, gradient in self._leaving:
            by_dtype.setdefault(parameter.sharded.dtype, []).append((parameter, gradient))
        self._leaving = []
        for dtype, batch in by_dtype.items():
            parts = [self._parts(gradient.factor.to(dtype)).flatten(1) for _, gradient in batch]
            given = torch.cat(parts, dim=1).div_(self._divisor(batch[0][0])).flatten()
            taken = given.new_empty(given.numel() // len(parts[0]))
            self._count(given)
            work = _reduce_scatter(taken, given, group=self.group, async_op=True)
            self._scattered.append((work, taken, batch))

    def _divisor(self, parameter: FsdpParameter) -> float:
        factor = parameter.gradient_divide_factor
        return float(self.ranks if factor is None else factor)

    def _parts(self, factor: torch.Tensor) -> torch.Tensor:
        """[m, r] as [ranks, rows of a rank, r], as FSDP2 parts a weight; with zeros behind the last row."""
        world = dist.get_world_size(self.group)
        rows = -(-factor.shape[0] // world)
        padded = torch.nn.functional.pad(factor, (0, 0, 0, rows * world - factor.shape[0]))
        return padded.view(world, rows, factor.shape[1])

    def _launch_rest(self) -> None:
        if self._leaving:
            self._scatter()
        super()._launch_rest()

    def _arrive(self) -> None:
        super()._arrive()
        for work, taken, batch in self._scattered:
            work.wait()
            self._sum_over_replicas(taken)
            sizes = [self._parts(gradient.factor)[0].numel() for _, gradient in batch]
            for (parameter, gradient), part in zip(batch, torch.split(taken, sizes), strict=True):
                shard = parameter.sharded.to_local()  # type: ignore[attr-defined]
                rows = part.view(-1, gradient.factor.shape[1])[: shard.shape[0]]
                self._give(parameter, LowRankGrad(rows.clone(), gradient.subspace, shard, features=gradient.features))

    def _sum_over_replicas(self, part: torch.Tensor) -> None:
        if self._replicas is not None:
            self._count(part)
            dist.all_reduce(part, group=self._replicas)

    def _give(self, parameter: FsdpParameter, gradient: LowRankGrad) -> None:
        present = parameter.sharded.grad
        if present is None:
            parameter.sharded.grad = as_shard(gradient, parameter.sharded)
        else:  # micro-batches that were each sent
            present.to_local().add_(gradient)  # type: ignore[attr-defined]
