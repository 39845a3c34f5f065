"""One basis read in several precisions by one graph: each use counts in the statistic by what it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.rules import DCT, GradientPower
from oasis_fx.runtime.subspaces.store import STORE
from tests.rules import moving_every

ALL = ["oja", "pca", "random", "principal_random", "sampled", "gradient_svd", "gradient_oja", "gradient_power", "dct",
       DCT("gradient"), GradientPower(error_feedback=True)]  # fmt: skip


def matmul(w, x, y, half):
    return F.linear(x.to(half), w.to(half)), F.linear(y, w)


def experts(w, x, y, half):
    return torch.bmm(x.to(half), w.to(half).mT), torch.bmm(y, w.mT)


def convolution(w, x, y, half):
    return F.conv1d(x.to(half), w.to(half)), F.conv1d(y, w)


def patches(x: torch.Tensor, kind) -> torch.Tensor:
    """The rows that the weight meets: [N, n]."""
    if kind is convolution:
        return x.unfold(2, 3, 1).permute(0, 2, 1, 3).reshape(-1, x.shape[1] * 3)
    return x.reshape(-1, x.shape[-1])


SHAPES = {matmul: ((5, 6), (20, 6)), experts: ((2, 5, 6), (2, 20, 6)), convolution: ((5, 4, 3), (3, 4, 9))}


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES, ids=lambda kind: kind.__name__)
def test_uses_in_two_precisions_count_alike(kind, half) -> None:
    torch.manual_seed(0)
    shape, batch = SHAPES[kind]
    w = torch.nn.Parameter(torch.randn(shape) / 2)
    x, y = torch.randn(batch), torch.randn(batch)
    compiled = torch.compile(kind, backend=oasis_backend(3, inner="aot_eager"))
    first, second = compiled(w, x, y, half)
    (first.float().sum() + second.sum()).backward()
    (subspace,) = STORE.all_of(w)
    rows = [patches(a, kind).double() for a in (x.to(half), y)]
    q = subspace.basis.detach().double()
    for found, expected in (
        (subspace.statistic, sum(a.T @ (a @ q) for a in rows)),
        (subspace.energy_sum, sum(a.square().sum() for a in rows)),
    ):
        assert float((found.double() - expected).norm() / expected.norm()) < 0.02


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(2, 6, 5) / 3)

    def forward(self, x):
        h = self.down(torch.tanh(self.up(x)))
        return self.up(h).float().square().mean() + torch.bmm(h.expand(2, -1, -1), self.experts).float().square().mean()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ALL, ids=str)
def test_every_rule_under_autocast(rule, half) -> None:
    """At full rank the gradients are stock's under autocast, but for rounding; then it trains."""
    torch.manual_seed(1)
    x = torch.randn(12, 6)
    model, plain = Net(), Net()
    compiled = torch.compile(model, backend=oasis_backend(64, subspace=moving_every(rule, 1), inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    with torch.autocast("cpu", half):
        plain(x).backward()
    losses = []
    for step in range(4):
        with torch.autocast("cpu", half):
            loss = compiled(x)
        loss.backward()
        if step == 0:
            for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
                gradient = found.grad
                assert gradient.dtype == torch.float32
                if isinstance(gradient, LowRankGrad):
                    if not gradient.subspace.spec.rule.orthonormal:
                        q = gradient.basis
                        gradient = LowRankGrad(
                            gradient.factor @ torch.linalg.inv(q.mT @ q), gradient.subspace, gradient,
                            features=gradient.features,
                        )  # fmt: skip
                    gradient = gradient.to_dense()
                assert float((gradient - expected.grad).norm() / expected.grad.norm()) < 0.03
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
