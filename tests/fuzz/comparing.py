"""Compare a run under the backend with the reference."""

from __future__ import annotations

import torch

from fuzz.closeness import Comparison
from fuzz.program import Program
from fuzz.projected import compare_dense
from fuzz.running import Run, rule
from fuzz.statistics import compare_statistic
from oasis_fx import LowRankGrad
from oasis_fx.graph.matricization import as_rows
from oasis_fx.runtime.subspaces.subspace import Subspace


def compare(program: Program, reference: Run, run: Run, counts: dict[str, int]) -> None:
    same = Comparison(program, counts)
    for number, (out, right) in enumerate(zip(run.outputs, reference.outputs, strict=True)):
        for name, o, r in zip(program.returns, out, right, strict=True):
            same("output", f"{name} of call {number}", o, r)
    for buffer, right in zip(run.net.named_buffers(), reference.net.buffers(), strict=True):
        same("buffer", *buffer, right)
    for given, right in zip(run.batches, reference.batches, strict=True):
        for parameter, x, r in zip(program.inputs, given, right, strict=True):
            same("input", parameter.name, x, r)
    for leaf, right in zip(run.leaves, reference.leaves, strict=True):
        same("input gradient", "an input", leaf.grad, right.grad)
    expected = dict(reference.net.named_parameters())
    groups: dict[Subspace, list[tuple[str, LowRankGrad]]] = {}
    for name, parameter in run.net.named_parameters():
        gradient, dense = parameter.grad, expected[name].grad
        same("weight", name, parameter, expected[name])
        if isinstance(gradient, LowRankGrad) and gradient.basis is not None:
            _compare_factor(same, name, gradient, torch.zeros_like(parameter) if dense is None else dense)
            groups.setdefault(gradient.subspace, []).append((name, gradient))
            continue
        matrix = gradient.to_dense() if isinstance(gradient, LowRankGrad) else gradient
        if matrix is None or dense is None or matrix.dim() < 2 or _is_exact(program):
            same("dense gradient", name, matrix, dense)
        else:
            compare_dense(reference, run, same, name, matrix, dense)
    for subspace, members in groups.items():
        compare_statistic(program, reference, run, same, subspace, members)


def _is_exact(program: Program) -> bool:
    """Whether ``Q Q^T = I`` for every basis."""
    return program.options.rank == 99 and rule(program).orthonormal


def _compare_factor(same: Comparison, name: str, gradient: LowRankGrad, dense: torch.Tensor) -> None:
    basis = gradient.basis
    assert basis is not None
    basis, chosen = basis.detach(), gradient.subspace.spec.rule
    weights = chosen.weights(*basis.shape) if hasattr(chosen, "weights") else None
    projection = basis if weights is None else basis * weights.to(basis)
    same("low-rank gradient", name, gradient.factor, as_rows(dense, gradient.features).to(basis.dtype) @ projection)
    if chosen.orthonormal:
        eye = torch.eye(basis.shape[1], dtype=basis.dtype)
        same("basis", f"that of {name}", basis.mT @ basis, eye)
        if basis.shape[0] == basis.shape[1]:
            same("low-rank gradient at full rank", name, gradient.to_dense(), dense)
    same(
        "low-rank gradient as a matrix",
        name,
        as_rows(gradient.to_dense(), gradient.features),
        gradient.factor.to(basis.dtype) @ basis.mT,
    )
