"""Compare dense gradients that may be sums of projected ones.

So they are where a rule leaves gradients dense, and where graphs read a weight in different ways: each use of the
weight then has a share ``dW Q Q^T``, for one basis or another, or a whole dW.
"""

from __future__ import annotations

import itertools
import math

import torch

from fuzz.closeness import Comparison, Wrong
from fuzz.running import Run, Use
from oasis_fx.graph.matricization import Features, as_rows, from_rows, num_features
from oasis_fx.runtime.subspaces.store import STORE

_MOST = 5000  # sums that are tried


def compare_dense(
    reference: Run, run: Run, same: Comparison, name: str, gradient: torch.Tensor, dense: torch.Tensor
) -> None:
    """Raise `Wrong` where a gradient is neither dW nor a sum of the shares of its uses."""
    if same.error(gradient, dense) <= same.close:
        same.count("dense gradient")
        return
    uses = [use for use in reference.net.uses if use.weight == name]
    shares = [share for use in uses for share in [_shares(run, same, name, use)] if share]
    rest = dense - sum((share[0] for share in shares), torch.zeros_like(dense))
    if float(rest.norm()) > same.close * (1 + float(dense.norm())):  # of reads that the reference does not part
        if sum(use.gradient() is None for use in uses) > 1:  # `torch.autograd.grad` by the weights alone
            same.missed("projected gradient")
            return
        shares.append(_shares(run, same, name, Use(name, None), rest))
    if math.prod(map(len, shares)) > _MOST:
        same.missed("projected gradient")
        return
    same.count("projected gradient")
    errors = [same.error(gradient, sum(one[1:], one[0])) for one in itertools.product(*shares) if one]
    found = min(errors, default=math.inf) <= same.close
    if not found and run.sampled and len(shares) == 1:  # each part of a weight that is read in parts has its own basis
        found = _each_row_in(gradient, _shares(run, same, name, Use(name, None), dense), same)
    if not found:
        raise Wrong("dense gradient", f"{name}: off by {same.error(gradient, dense):.3g}, and no sum of projections")


def _shares(
    run: Run, same: Comparison, name: str, use: Use, gradient: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """What a use may add to the gradient: its dW, or that projected. Nothing where it has none."""
    gradient = use.gradient() if gradient is None else gradient
    if gradient is None:
        return []
    bases: list[tuple[torch.Tensor, torch.Tensor]] = []  # Q as it projects, and as it leads back
    for subspace in STORE.all_of(run.net.get_parameter(name)):
        rule, basis = subspace.spec.rule, subspace.basis.detach()
        weights = rule.weights(*basis.shape) if hasattr(rule, "weights") else None
        bases.append((basis if weights is None else basis * weights.to(basis), basis))
    for x, basis in run.sampled:
        rows = use.rows
        if rows is None or (rows.shape[1] == x.shape[1] and same.error(x.mT @ x, (rows.mT @ rows).to(x)) <= same.close):
            bases.append((basis, basis))
    found = [gradient]
    for start in range(gradient.dim()):
        for stop in range(start + 1, gradient.dim() + 1):
            for projection, basis in bases:
                if num_features(gradient.shape, (start, stop)) == basis.shape[0]:
                    found.append(_projected(gradient, projection, basis, (start, stop)))
    return [one for i, one in enumerate(found) if all(same.error(one, other) > 1e-12 for other in found[:i])]


def _each_row_in(gradient: torch.Tensor, shares: list[torch.Tensor], same: Comparison) -> bool:
    """Whether each row (or expert) of a gradient is that of one of the shares."""
    rows = range(gradient.shape[0])
    return all(any(same.error(gradient[row], share[row]) <= same.close for share in shares) for row in rows)


def _projected(
    gradient: torch.Tensor, projection: torch.Tensor, basis: torch.Tensor, features: Features
) -> torch.Tensor:
    rows = as_rows(gradient, features).to(basis.dtype) @ projection @ basis.mT
    return from_rows(rows, gradient.shape, features).to(gradient.dtype)
