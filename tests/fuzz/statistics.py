"""Compare statistics: C must be a sum of ``X^T X Q`` over the uses of the weights that share the basis.

A value that several weights read, or one several times, counts as often as the graph has nodes for it. A use has to
count if it has a share in dW; others, whose outputs nothing reads, may.
"""

from __future__ import annotations

import itertools
import math

import torch

from fuzz.closeness import Comparison, Wrong
from fuzz.program import Program
from fuzz.running import Run
from oasis_fx import LowRankGrad
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.subspaces.rules import StatisticRule
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Subspace

_MOST = 3000  # sums that are tried

Term = tuple[torch.Tensor, int, int]  # X^T X Q, how often it must count and how often it may


def compare_statistic(
    program: Program,
    reference: Run,
    run: Run,
    same: Comparison,
    subspace: Subspace,
    members: list[tuple[str, LowRankGrad]],
) -> None:
    """Raise `Wrong` where C is not what it should be; ``members`` are the weights with gradients in the subspace."""
    if not isinstance(subspace.spec.rule, StatisticRule):
        return
    found, names = subspace.statistic, [name for name, _ in members]
    if found is None:
        raise Wrong("statistic", f"that of {names} is missing")
    if not bool(found.isfinite().all()):
        raise Wrong("statistic", f"that of {names} is not finite")
    if subspace.spec.rule.on == "gradient":
        # Of several graphs it is a sum, as of several calls; Dynamo may break one where no statement asks for it.
        if reference.num_calls == reference.num_backwards == run.num_graphs == 1:
            ((name, gradient),) = members
            dense = reference.net.get_parameter(name).grad
            rows = as_rows(torch.zeros_like(gradient.to_dense()) if dense is None else dense, gradient.features)
            rows, basis = rows.to(found.dtype), subspace.basis.detach()
            same("statistic of a gradient", name, found, rows.mT @ (rows @ basis))
        return
    parted = {read.weight for s in program.statements() for read in s.reads if "for part in" in s.text}
    terms = _terms(reference, run, same, subspace, members, parted)
    if terms is None:
        same.missed("statistic")
        return
    same.count("statistic")
    if not _is_a_sum(found.detach(), terms, max(same.close, 1e-7), same):
        matrix = torch.stack([term.flatten() for term, *_ in terms], 1).double()
        counts = (
            torch.linalg.lstsq(matrix, found.detach().double().flatten()[:, None], driver="gelsd")
            .solution[:, 0]
            .tolist()
        )
        text = ", ".join(f"{c:.4g} of {least} to {most}" for c, (_, least, most) in zip(counts, terms, strict=True))
        raise Wrong("statistic", f"that of {names}: each X^T X Q counts {text}")


def _terms(
    reference: Run,
    run: Run,
    same: Comparison,
    subspace: Subspace,
    members: list[tuple[str, LowRankGrad]],
    parted: set[str],
) -> list[Term] | None:
    """What C is made of, equal ones together; None where the X of a use is not known, or changes after it.

    X counts once for each part of the weights named by ``parted``, unless the graph has one node for all.
    Weights whose gradients are dense in the end, as where another graph reads them differently, may have a share too.
    """
    basis, times = subspace.basis.detach(), max(1, reference.num_backwards)
    sharing = {name for name, weight in run.net.named_parameters() if subspace in STORE.all_of(weight)}
    summed = {name: tuple(range(*gradient.features)) for name, gradient in members}
    terms: list[Term] = []
    for use in reference.net.uses:
        if use.weight not in sharing:
            continue
        if use.rows is None or use.has_changed:
            return None
        if use.rows.shape[1] != basis.shape[0]:
            continue
        rows = use.rows.to(basis.dtype)
        term, gradient = rows.mT @ (rows @ basis), use.gradient()
        counts = use.weight in summed and use.summed in ((), summed[use.weight]) and gradient is not None
        least = int(counts and float(gradient.norm()) > same.close)
        most = times * len(run.net.get_parameter(use.weight)) if use.weight in parted else times
        for index, (known, at_least, at_most) in enumerate(terms):
            if same.error(term, known) <= same.close:
                terms[index] = known, max(least, at_least), at_most + most
                break
        else:
            terms.append((term, least, most))
    return terms or None


def _is_a_sum(found: torch.Tensor, terms: list[Term], close: float, same: Comparison) -> bool:
    ranges = [range(least, most + 1) for _, least, most in terms]
    if math.prod(map(len, ranges)) <= _MOST:
        tries = itertools.product(*ranges)
    else:
        matrix = torch.stack([term.flatten() for term, *_ in terms], 1).double()
        solution = torch.linalg.lstsq(matrix, found.double().flatten()[:, None], driver="gelsd").solution[:, 0]
        tries = iter([tuple(int(count) for count in solution.round())])
    matrices = torch.stack([term for term, *_ in terms])
    for counts in tries:
        total = torch.tensordot(torch.tensor(counts, dtype=matrices.dtype), matrices, 1)
        if all(c in allowed for c, allowed in zip(counts, ranges, strict=True)) and same.error(found, total) <= close:
            return True
    return False
