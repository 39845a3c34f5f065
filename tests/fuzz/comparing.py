"""Compare a run under the backend with the reference."""

from __future__ import annotations

from typing import Any

import torch

from fuzz.closeness import Comparison
from fuzz.program import Program
from fuzz.running import Run, Use
from fuzz.statistics import compare_statistic
from oasis_fx import LowRankGrad
from oasis_fx.runtime.layout import as_rows
from oasis_fx.runtime.rules import RULES
from oasis_fx.runtime.subspace import Subspace


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
        if not isinstance(gradient, LowRankGrad):
            _compare_dense(program, reference, run, same, name, gradient, dense)
        elif gradient.basis is None:
            if _is_exact(program):
                same("gradient turned dense", name, gradient.to_dense(), dense)
            else:
                same.missed("gradient turned dense")
        else:
            _compare_factor(same, name, gradient, torch.zeros_like(parameter) if dense is None else dense)
            groups.setdefault(gradient.subspace, []).append((name, gradient))
    for subspace, members in groups.items():
        compare_statistic(program, reference, same, subspace, members)


def _is_exact(program: Program) -> bool:
    """Whether ``Q Q^T = I`` for every basis."""
    return program.options.rank == 99 and RULES[program.options.rule].orthonormal


def _compare_factor(same: Comparison, name: str, gradient: LowRankGrad, dense: torch.Tensor) -> None:
    basis = gradient.basis
    assert basis is not None
    basis, rule = basis.detach(), gradient.subspace.spec.rule
    weights = rule.weights(*basis.shape) if hasattr(rule, "weights") else None
    projection = basis if weights is None else basis * weights.to(basis)
    same("low-rank gradient", name, gradient.factor, as_rows(dense, gradient.features).to(basis.dtype) @ projection)
    if rule.orthonormal:
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


def _compare_dense(
    program: Program,
    reference: Run,
    run: Run,
    same: Comparison,
    name: str,
    gradient: torch.Tensor | None,
    dense: torch.Tensor | None,
) -> None:
    if not run.sampled or gradient is None or dense is None or _is_exact(program) or gradient.dim() < 2:
        same("dense gradient", name, gradient, dense)
        return
    if same.error(gradient, dense) <= same.close:
        return  # it was not rewritten
    uses = [use for use in reference.net.uses if use.weight == name and use.gradient() is not None]
    for features in [(start, stop) for start in range(dense.dim()) for stop in range(start + 1, dense.dim() + 1)]:
        total = _sum_of_projections(uses, run.sampled, features, same)
        if total is None:
            continue
        same("gradient of a dense rule", name, as_rows(gradient, features), total)
        return
    same.missed("gradient of a dense rule")


def _sum_of_projections(
    uses: list[Use], sampled: list[tuple[torch.Tensor, torch.Tensor]], features: tuple[int, int], same: Comparison
) -> torch.Tensor | None:
    """The sum of ``dW Q Q^T`` over uses; None where the basis of one is not known for sure."""
    total: Any = 0
    for use in uses:
        gradient = use.gradient()
        assert gradient is not None
        rows = as_rows(gradient, features)
        if use.rows is None or use.rows.shape[1] != rows.shape[1]:
            return None
        gram = use.rows.mT @ use.rows
        bases = [
            q
            for x, q in sampled
            if x.shape[1] == gram.shape[0] and same.error(x.mT @ x, gram.to(x.dtype)) <= same.close
        ]
        projections = [rows.to(q.dtype) @ q @ q.mT for q in bases]
        if not projections or any(same.error(p, projections[0]) > same.close for p in projections):
            return None
        total = total + projections[0]
    return total if uses else None
