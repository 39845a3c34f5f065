"""Gives an optimizer that is not ours dense gradients in place of low-rank ones, with one warning.

Most optimizers would make matrices of low-rank gradients anyway. Kernels of an optimizer's own (bitsandbytes, torchao)
could not read a factor, and what an optimizer keeps of a gradient, as a momentum that begins as a copy of it, must not
be in coordinates that move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from oasis_fx.errors import warn_user
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces.shards import local_gradient
from oasis_fx.runtime.subspaces.store import STORE

_watching: list[Any] = []
_warned: set[str] = set()


def watch() -> None:
    """Look at the gradients of every optimizer before each of its steps, from now on; a second call does nothing."""
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_step))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Turn the low-rank gradients of an optimizer's weights dense, in their weights' shapes, unless it takes them.

    Raises:
        RuntimeError: the optimizer is a ZeroRedundancyOptimizer around one of ours, on more than one rank.
        StaleGradientError: the basis of a gradient has moved since the backward pass that computed it.
    """
    if getattr(optimizer, "takes_low_rank_gradients", False):
        return
    _refuse_parts_of_a_model(optimizer)
    found = False
    for group in optimizer.param_groups:
        for weight in group["params"]:
            gradient = weight.grad
            if isinstance(gradient, LowRankGrad):
                found = True
                weight.grad = gradient.become_dense()
            elif gradient is not None and isinstance(local_gradient(weight), LowRankGrad):
                found = True  # a shard: its optimizer's operators work on the local part
    name = type(optimizer).__name__
    if found and name not in _warned:
        _warned.add(name)
        warn_user(
            f"{name} is given full-size gradients of the weights that oasis_fx has rewritten, so its states are "
            "full-size too. OasisAdamW (or OasisSGD, OasisLion, OasisMuon) keeps them small; with this optimizer call "
            "oasis_fx.update_bases(model.parameters()) after each step, or the bases never move"
        )


def _refuse_parts_of_a_model(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of ours that steps each weight on one rank alone: its basis would move on no other.

    Raises:
        RuntimeError: it is within a ZeroRedundancyOptimizer on more than one rank, and a weight has a subspace.
    """
    if not any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        return
    inner = optimizer.optim  # type: ignore[attr-defined]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    alone = optimizer.world_size == 1  # type: ignore[attr-defined]
    if alone or not getattr(inner, "takes_low_rank_gradients", False):
        return
    if any(STORE.all_of(weight) for weight in weights):
        raise RuntimeError(
            f"ZeroRedundancyOptimizer around {type(inner).__name__}: each rank would move the bases of the weights "
            "that it steps and of no others, so that ranks no longer agree on what a low-rank gradient means. Use "
            f"{type(inner).__name__} with DistributedDataParallel, or with FSDP2 (fully_shard), which shards its states"
        )
