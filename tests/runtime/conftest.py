"""What a compiled graph does with the runtime's inputs, without compiling one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from oasis_fx.runtime.gradients.slots import Group, lend
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE


class _LowRankProduct(torch.autograd.Function):
    """``x @ w.T`` (or ``x @ w``) that gives C to the basis and G to the slot, and nothing to w."""

    @staticmethod
    def forward(ctx, x, w, basis, slot, transposed):
        ctx.save_for_backward(x, w, basis)
        ctx.transposed = transposed
        return x @ (w if transposed else w.T)

    @staticmethod
    def backward(ctx, dy):
        x, w, basis = ctx.saved_tensors
        p = x @ basis.to(x.dtype)
        dx = dy @ (w.T if ctx.transposed else w)
        return dx, None, (x.T @ p).to(basis.dtype), dy.T @ p, None


def low_rank_products(
    x: torch.Tensor, weights: Sequence[torch.Tensor], spec: SubspaceSpec, transposed: bool = False
) -> list[torch.Tensor]:
    """Products of one activation with weights that share a basis, as a compiled graph computes them."""
    features = [(0, 1) if transposed else (1, 2)] * len(weights)
    subspace = STORE.resolve(weights, spec, features)
    lent = lend([Group(subspace, tuple(weights), tuple(features))])
    # One statistic for the group, as in the graph: the others get a basis that takes none.
    bases = [lent.bases[0]] + [subspace.basis] * (len(weights) - 1)
    return [
        _LowRankProduct.apply(x, w, basis, slot, transposed)
        for w, basis, slot in zip(weights, bases, lent.slots, strict=True)
    ]


@pytest.fixture
def products():
    return low_rank_products


@pytest.fixture
def make_weight():
    def make(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
        generator = torch.Generator().manual_seed(seed)
        return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))

    return make
