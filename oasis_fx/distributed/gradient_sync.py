"""Averages gradients over ranks while the backward pass goes on: what `oasis_fx.distributed.prepare` makes."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from oasis_fx._torch.distributed import at_end_of_backward
from oasis_fx.distributed.agreement import Agreement, check_agreement
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces.by_tensor import ByTensor
from oasis_fx.runtime.subspaces.rules import BatchRule
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

# What averages the gradient of a weight, by weak references. The store of subspaces is no place for it: weights in
# no subspace have one too, and it lasts as long as the object that `prepare` returned, not as long as a basis.
_syncs = ByTensor()
_changes = itertools.count(1)
_latest_change = 0


def state_of_syncs() -> int:
    """Return a number that is equal at two moments only if no `GradientSync` has taken over weights or let go of any.

    One that is gone without having let go is not counted: its weak references tell.
    """
    return _latest_change


def _note_change() -> None:
    global _latest_change
    _latest_change = next(_changes)


def sync_of(weight: torch.Tensor) -> GradientSync | None:
    """Return what averages the gradient of a parameter, as compiled graphs see it, or None where nothing does."""
    found = _syncs.get(weight) if _syncs else None
    return None if found is None else found()


def _hook(weight: torch.nn.Parameter, function: Callable[[Any], None]) -> Any:
    """Register a hook for complete gradients, also where the weight is frozen now: it may be thawed later."""
    frozen = not weight.requires_grad
    if frozen:
        weight.requires_grad_(True)  # torch asks for it, and keeps the hook when it is set back
    try:
        return weight.register_post_accumulate_grad_hook(function)
    finally:
        if frozen:
            weight.requires_grad_(False)


@dataclass
class _Bucket:
    tensors: list[torch.Tensor] = field(default_factory=list)
    num_bytes: int = 0


class GradientSync:
    """What `oasis_fx.distributed.prepare` returns: it averages the gradients of the model's weights over ranks.

    Attributes:
        ranks: the number of ranks over which gradients are averaged.
        replicas: these ranks, where they are more than one; else empty.
        sent: the bytes that this rank has given to collectives so far.
        early: the part of them that it gave while a backward pass was going on.
        dense: the bytes that DDP would have given for the same gradients.
    """

    peer = "DDP"  # what would have sent gradients at full size

    def __init__(self, weights: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None, bucket_bytes: int):
        self.group, self.bucket_bytes = group, bucket_bytes
        self.ranks = dist.get_world_size(group)
        self.replicas = frozenset(dist.get_process_group_ranks(group) if self.ranks > 1 else ())
        self.sent = self.early = self.dense = 0
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._device = weights[0].device if weights else torch.device("cpu")
        self._unsent: set[torch.nn.Parameter] = set()  # of backward passes under no_sync
        self._numbers = {weight: number for number, weight in enumerate(weights)}
        self._hooks: dict[torch.nn.Parameter, Any] = {}
        for weight in weights:
            before = sync_of(weight)
            if before is not None:  # the model was synchronized before: the new one takes its place
                self._take_over(before, weight)
            self._hooks[weight] = _hook(weight, self._complete)
            _syncs[weight] = weakref.ref(self)
        _note_change()
        self._reset()

    def follow(self, ddp: DistributedDataParallel) -> None:
        """Send nothing in backward passes in which ``ddp`` sends nothing, under its `no_sync()`.

        A compiled graph that runs within the forward pass of ``ddp`` calls this by itself.

        Raises:
            RuntimeError: ``ddp`` runs within `torch.distributed.algorithms.join.Join`.
        """
        if ddp._join_config.enable:
            raise RuntimeError(
                "torch.distributed.algorithms.join.Join: a rank that has run out of inputs would not take part in what "
                "oasis_fx.distributed.prepare averages. Give every rank the same number of batches "
                "(DistributedSampler with drop_last=True), or train without oasis_backend and prepare"
            )
        if self._ddp is None or self._ddp() is not ddp:
            self._ddp = weakref.ref(ddp)

    def remove(self) -> None:
        """Stop averaging. A compiled graph under DistributedDataParallel is refused from then on."""
        for weight in list(self._hooks):
            self._let_go(weight)
            _syncs.pop(weight, None)
        _note_change()

    def _let_go(self, weight: torch.nn.Parameter) -> None:
        self._hooks.pop(weight).remove()

    def _take_over(self, before: GradientSync, weight: torch.nn.Parameter) -> None:
        """Average a weight from now on, with what micro-batches have gathered of it so far."""
        before._let_go(weight)
        if weight in before._unsent:
            before._unsent.remove(weight)
            self._unsent.add(weight)

    def __str__(self) -> str:
        num_weights = sum(weight.requires_grad for weight in self._hooks)
        sent = f"{num_weights} weights averaged over {self.ranks} ranks: {self.sent / 2**20:.1f} MiB sent"
        if not self.sent:
            return sent
        share = f"{self.sent / max(1, self.dense):.2f} of what {self.peer} would have sent"
        return f"{sent}, {share}, {self.early / self.sent:.2f} of it while backward passes went on"

    def _reset(self) -> None:
        self._buckets: dict[Any, _Bucket] = {}
        self._flying: list[tuple[Any, torch.Tensor, list[torch.Tensor]]] = []
        self._subspaces: dict[Subspace, None] = {}
        self._agreement = Agreement()
        self._waits = self._ends = False

    def _complete(self, weight: torch.nn.Parameter) -> None:
        """The gradient of a weight is complete."""
        if self.ranks == 1:
            return
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None and not ddp.require_backward_grad_sync:
            self._unsent.add(weight)
            return
        self._begin()
        self._unsent.discard(weight)
        self._take(weight)

    def _begin(self) -> None:
        if not self._waits:
            self._waits = True
            at_end_of_backward(self._finish)

    def _late(self) -> list[torch.nn.Parameter]:
        """Weights that an earlier micro-batch has used, and this one has not."""
        late = [weight for weight in self._unsent if weight.grad is not None]
        self._unsent.clear()
        return late

    def _take(self, weight: torch.nn.Parameter) -> None:
        gradient = weight.grad
        assert gradient is not None
        values, subspace = gradient, None
        if isinstance(gradient, LowRankGrad):
            values = gradient.factor
            if gradient.is_low_rank:
                subspace = gradient.subspace
                self._note(subspace)
        self._sign(weight, values, subspace)
        self._note_statistics(weight)
        self._add(values)

    def _note_statistics(self, weight: torch.nn.Parameter) -> None:
        """Average what the bases of a weight move by, whatever a hook has made of its gradient."""
        for subspace in STORE.all_of(weight):
            if subspace.statistic is not None:
                self._note(subspace)

    def _sign(self, weight: torch.nn.Parameter, values: torch.Tensor, subspace: Subspace | None) -> None:
        self._agreement.sign(self._numbers[weight], values, subspace)
        self.dense += weight.numel() * values.element_size()

    def _note(self, subspace: Subspace) -> None:
        rule = subspace.spec.rule
        if isinstance(rule, BatchRule):
            raise RuntimeError(
                f"subspace={rule.name!r} chooses the basis of {subspace.spoken_name} from the batch of one rank: under "
                "data parallel training every rank would have a basis of its own. Use 'oja', 'gradient_oja' or 'random'"
            )
        self._subspaces[subspace] = None

    def _add(self, values: torch.Tensor) -> None:
        key = values.dtype, values.device
        bucket = self._buckets.setdefault(key, _Bucket())
        bucket.tensors.append(values)
        bucket.num_bytes += values.nbytes
        if bucket.num_bytes >= self.bucket_bytes:
            self._launch(self._buckets.pop(key).tensors)

    def _launch(self, tensors: list[torch.Tensor]) -> None:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).div_(self.ranks)
        self._count(flat)
        self._flying.append((dist.all_reduce(flat, group=self.group, async_op=True), flat, tensors))

    def _count(self, given: torch.Tensor) -> None:
        self.sent += given.nbytes
        self.early += 0 if self._ends else given.nbytes

    @torch.no_grad()
    def _finish(self) -> None:
        """The backward pass is over: the rest, the statistics, and what came of it all."""
        self._ends = True
        try:
            for weight in sorted(self._late(), key=self._numbers.__getitem__):
                self._take(weight)
            for subspace in self._subspaces:
                statistics = (subspace.statistic, subspace.energy_sum)
                for tensor in [s for s in statistics if s is not None]:
                    self._add(tensor)
            own = self._agreement.fingerprint(list(self._subspaces), self._device)
            agreed = own.clone()
            self._add(agreed)
            self._launch_rest()
            self._arrive()
            for subspace in self._subspaces:
                subspace.statistic_is_local = False
            check_agreement(own, agreed, list(self._subspaces))
        finally:
            self._reset()

    def _launch_rest(self) -> None:
        for bucket in self._buckets.values():
            self._launch(bucket.tensors)

    def _sum_over_replicas(self, part: torch.Tensor) -> None:
        """What hybrid sharding does besides."""

    def _arrive(self) -> None:
        for work, flat, tensors in self._flying:
            work.wait()
            self._sum_over_replicas(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))
