"""Make subspaces that have not moved yet."""

from __future__ import annotations

import torch

from oasis_fx.runtime.subspaces.rules import BatchRule, DrawnRule
from oasis_fx.runtime.subspaces.seeds import generator_of
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.state import SubspaceState
from oasis_fx.runtime.subspaces.subspace import Subspace


def initial_basis(n: int, r: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Return a random orthonormal matrix [n, r]: a function of the arguments alone, and so the same on every rank.

    Args:
        n, r: rows and columns, r <= n.
        dtype, device: of the result.
        seed: any whole number; other numbers give other matrices.
    """
    gaussian = torch.randn(n, r, dtype=torch.float64, generator=generator_of(seed, n, r), device="cpu")
    return torch.linalg.qr(gaussian).Q.to(device=device, dtype=dtype).contiguous()


def new_subspace(basis: torch.Tensor, spec: SubspaceSpec, seed: int = 0) -> Subspace:
    """Return a subspace that has not moved yet.

    Args:
        basis: Q [n, r] to start from, taken over without a copy; of a coded rule, for its shape, dtype and device.
        spec: what is asked for.
        seed: tells subspaces of one shape apart where the rule draws at random.
    """
    n, r = basis.shape
    coded, dtype, device = spec.rule.coded, basis.dtype, basis.device
    state = SubspaceState(
        (n, r),
        dtype,
        device,
        # A basis that waits for data is random: it is due at the first step, not at the k-th.
        steps_since_due=torch.tensor(_first_count(spec), device="cpu"),
        stored_basis=None if coded else basis.detach().contiguous(),
        code=spec.rule.first_code(r, seed) if coded else None,
        seed=seed,
    )
    return Subspace(spec, state)


def _first_count(spec: SubspaceSpec) -> int:
    if isinstance(spec.rule, DrawnRule):
        return 0
    return spec.rule.every if isinstance(spec.rule, BatchRule) else spec.rule.every - 1
