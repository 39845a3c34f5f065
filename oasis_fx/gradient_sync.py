"""Averages gradients over ranks while the backward pass goes on: what `oasis_fx.distributed.synchronize` makes."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

from oasis_fx.runtime.low_rank_grad import LowRankGrad
from oasis_fx.runtime.rules import BatchRule
from oasis_fx.runtime.store import STORE
from oasis_fx.runtime.subspace import Subspace
from oasis_fx.torch_private import at_end_of_backward

_syncs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weak references, by weight


def sync_of(weight: torch.Tensor) -> GradientSync | None:
    """What averages the gradient of a parameter, as compiled graphs see it; None for nothing."""
    found = _syncs.get(weight) if _syncs else None
    return None if found is None else found()


@dataclass
class _Bucket:
    tensors: list[torch.Tensor] = field(default_factory=list)
    num_bytes: int = 0


class GradientSync:
    """Averages the gradients of some weights over ranks. Made by `synchronize`.

    Attributes:
        sent: bytes that this rank has given to collectives so far.
        ranks: gradients are averaged over so many.
        early: those of them that it gave while a backward pass went on.
        dense: bytes that DDP would have given for the same gradients.
    """

    peer = "DDP"  # what would have sent gradients at full size

    def __init__(self, weights: Sequence[torch.nn.Parameter], group: dist.ProcessGroup | None, bucket_bytes: int):
        self.group, self.bucket_bytes = group, bucket_bytes
        self.ranks = dist.get_world_size(group)
        self.sent = self.early = self.dense = 0
        self._ddp: weakref.ref[DistributedDataParallel] | None = None
        self._device = weights[0].device if weights else torch.device("cpu")
        self._unsent: set[torch.nn.Parameter] = set()  # of backward passes under no_sync
        self._numbers = {weight: number for number, weight in enumerate(weights)}
        self._hooks = [weight.register_post_accumulate_grad_hook(self._complete) for weight in weights]
        for weight in weights:
            _syncs[weight] = weakref.ref(self)
        self._reset()

    def follow(self, ddp: DistributedDataParallel) -> None:
        """Send nothing in backward passes in which ``ddp`` sends nothing, under its `no_sync()`.

        A compiled graph that runs within the forward pass of ``ddp`` calls this by itself.
        """
        if self._ddp is None or self._ddp() is not ddp:
            self._ddp = weakref.ref(ddp)

    def remove(self) -> None:
        """Average no more; DDP is then refused again."""
        for hook in self._hooks:
            hook.remove()
        for weight in self._numbers:
            _syncs.pop(weight, None)

    def __str__(self) -> str:
        sent = f"{len(self._numbers)} weights averaged over {self.ranks} ranks: {self.sent / 2**20:.1f} MiB sent"
        if not self.sent:
            return sent
        share = f"{self.sent / max(1, self.dense):.2f} of what {self.peer} would have sent"
        return f"{sent}, {share}, {self.early / self.sent:.2f} of it while backward passes went on"

    def _reset(self) -> None:
        self._buckets: dict[Any, _Bucket] = {}
        self._flying: list[tuple[Any, torch.Tensor, list[torch.Tensor]]] = []
        self._subspaces: dict[Subspace, None] = {}
        self._checksum, self._waits, self._ends = 0, False, False

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
        values, kind = gradient, 0
        if isinstance(gradient, LowRankGrad):
            values = gradient.factor
            if gradient.is_low_rank:
                kind = self._note(gradient.subspace)
        self._sign(weight, values, kind)
        self._note_statistics(weight)
        self._add(values)

    def _note_statistics(self, weight: torch.nn.Parameter) -> None:
        """Average what the bases of a weight move by, whatever a hook has made of its gradient."""
        for subspace in STORE.all_of(weight):
            if subspace.statistic is not None:
                self._note(subspace)

    def _sign(self, weight: torch.nn.Parameter, values: torch.Tensor, kind: int) -> None:
        signature = repr((self._numbers[weight], tuple(values.shape), values.dtype, kind))
        self._checksum = zlib.crc32(signature.encode(), self._checksum)
        self.dense += weight.numel() * values.element_size()

    def _note(self, subspace: Subspace) -> int:
        rule = subspace.spec.rule
        if isinstance(rule, BatchRule):
            raise RuntimeError(
                f"subspace={rule.name!r} goes by the batch of one rank: under data parallel training every rank would "
                "have a basis of its own. Use 'oja', 'gradient_oja', 'random'"
            )
        self._subspaces[subspace] = None
        return 1 if subspace.code is None else 2 + zlib.crc32(subspace.code.numpy().tobytes())

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
            own = torch.tensor([float(self._checksum % 2**20)], dtype=torch.float64, device=self._device)
            agreed = own.clone()
            self._add(agreed)
            self._launch_rest()
            self._arrive()
            if not torch.equal(agreed, own):
                raise RuntimeError(
                    "ranks do not agree on which weights have which gradients: the same model, settings, seeds and "
                    "used weights are needed on all of them"
                )
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
