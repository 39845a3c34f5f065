"""Collectives of torch.distributed on low-rank gradients.

Where all ranks that take part have the same bases, a collective that sums, averages or copies is run on the factors
[m, r]. Any other is given the matrices that the gradients turn into. A rank decides between the two by what every rank
knows, since all of them must send tensors of one size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from oasis_fx.errors import warn_user
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad


def _on_shared_factors(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a collective on the factors of the gradients that it is given, or return NotImplemented.

    The factors have to be in bases that all ranks of the collective share and that have not moved since the backward
    pass, and the collective has to be linear. It writes into the factors, in the gradients' dtype.
    """
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    gradients = [leaf for leaf in tree_leaves(given["tensors"]) if isinstance(leaf, LowRankGrad)]
    taking_part = _ranks(given["process_group"])
    shared = all(g.is_low_rank and not g.is_stale and taking_part <= g.subspace.replicas for g in gradients)
    if not shared or not _is_linear(given.get("reduce_op")):
        return NotImplemented
    for gradient in gradients:  # a graph may leave a factor in any order; collectives want it by rows
        gradient.cell.values = gradient.cell.values.contiguous()
    back = {id(gradient.factor): gradient for gradient in gradients}
    factors = tree_map(lambda leaf: leaf.factor if isinstance(leaf, LowRankGrad) else leaf, (args, kwargs))
    result = func(*factors[0], **factors[1])
    return tree_map(lambda value: back.get(id(value), value) if isinstance(value, torch.Tensor) else value, result)


def _ranks(group: Any) -> frozenset[int]:
    """Return the global ranks of a process group, which operators get as a script object around it."""
    from torch.distributed import ProcessGroup, get_process_group_ranks

    if not isinstance(group, ProcessGroup):
        group = ProcessGroup.unbox(group)
    return frozenset(get_process_group_ranks(group))


def _is_linear(reduce_op: Any) -> bool:
    """Return whether a collective is linear in what it is given: a sum, an average, or (for None) a copy."""
    if reduce_op is None:
        return True
    from torch.distributed import ReduceOp

    if not hasattr(ReduceOp, "unbox"):  # torch up to 2.13 gives no look into it: at full size, which is right for all
        return False
    return ReduceOp.unbox(reduce_op).op in (ReduceOp.SUM, ReduceOp.AVG)  # type: ignore[attr-defined]


COLLECTIVES: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.c10d, name).default: _on_shared_factors
    for name in ("allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_")
    if hasattr(torch.ops.c10d, name)
}

_warned: set[str] = set()


def warn_of_bases_apart(func: Any, args: Any, kwargs: Any) -> None:
    """Warn, once for each subspace, where gradients go into a collective and every rank has a basis of its own.

    The collective gives the right result, at full size. But an optimizer of ours projects it on the basis of its rank,
    so that the weights of the ranks drift apart.
    """
    if func.namespace not in ("c10d", "_c10d_functional"):
        return
    for leaf in tree_leaves((args, kwargs)):
        if not isinstance(leaf, LowRankGrad) or not leaf.is_low_rank or leaf.subspace.replicas:
            continue
        if torch.distributed.get_world_size() > 1 and leaf.subspace.spoken_name not in _warned:
            _warned.add(leaf.subspace.spoken_name)
            warn_user(
                f"{func} of the gradient of {leaf.subspace.spoken_name}: its result is right, but each rank has a "
                "basis of its own, so that an optimizer of oasis_fx takes another step on each. Call "
                "oasis_fx.distributed.prepare(model), which averages gradients and the statistics that move bases"
            )
