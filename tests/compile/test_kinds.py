"""Every kind of weight gradient: G and C against an explicit matrix of what the weight multiplies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows


@dataclass
class Case:
    """A layer, its input, and the rows of X that its weight multiplies, in any order."""

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    weight: tuple[int, ...]
    x: tuple[int, ...]
    rows: Callable[[torch.Tensor], torch.Tensor]
    features: tuple[int, int]
    dtype: torch.dtype = torch.float64
    rank: int = 3


def unfolded(kernel: Any, **geometry: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.unfold(x, kernel, **geometry).transpose(1, 2).flatten(0, 1)


def grouped_by_transformers(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w.transpose(-2, -1), OFFSETS)


def in_parts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    first, second = w.split([2, 5])
    return torch.cat([F.linear(x, first), F.linear(x.sin(), second)], -1)


def heads_in_parts(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    parts = [torch.einsum("btn,hdn->bthd", x, part) for part in w.split([1, 2])]
    return torch.cat(parts, 2)


OFFSETS = torch.tensor([4, 4, 10], dtype=torch.int32)  # the second of three experts gets no token


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


CASES = {
    "batched [e, m, n]": Case(lambda x, w: x @ w.mT, (3, 5, 8), (3, 6, 8), flat, (2, 3)),
    "batched [e, n, m]": Case(torch.bmm, (3, 8, 5), (3, 6, 8), flat, (1, 2)),
    "batched, X transposed": Case(
        lambda x, w: torch.bmm(w, x), (3, 5, 8), (3, 8, 6), lambda x: flat(x.mT), (2, 3)
    ),
    "grouped by transformers": Case(grouped_by_transformers, (3, 5, 8), (10, 8), flat, (2, 3)),
    "grouped by torch": Case(
        lambda x, w: F.grouped_mm(x, w.mT, offs=OFFSETS), (3, 16, 16), (10, 16), flat, (2, 3), torch.bfloat16, 8
    ),
    "einsum over heads": Case(lambda x, w: torch.einsum("btn,hdn->bthd", x, w), (2, 3, 8), (2, 6, 8), flat, (2, 3)),
    "einsum, heads last": Case(lambda x, w: torch.einsum("btn,nhd->bthd", x, w), (8, 2, 3), (2, 6, 8), flat, (0, 1)),
    "1x1 convolution": Case(F.conv2d, (5, 4, 1, 1), (2, 4, 3, 3), unfolded(1), (1, 4)),
    "1x1 convolution, stride 2": Case(
        lambda x, w: F.conv2d(x, w, stride=2), (5, 4, 1, 1), (2, 4, 5, 5), unfolded(1, stride=2), (1, 4)
    ),
    "patch convolution": Case(
        lambda x, w: F.conv2d(x, w, stride=2), (5, 3, 2, 2), (2, 3, 6, 4), unfolded(2, stride=2), (1, 4)
    ),
    "patch convolution with a bias": Case(
        lambda x, w: F.conv2d(x, w, w.detach()[:, 0, 0, 0], stride=2), (5, 3, 2, 2), (2, 3, 6, 4),
        unfolded(2, stride=2), (1, 4),
    ),
    "1-D patch convolution": Case(
        lambda x, w: F.conv1d(x, w, stride=2), (5, 3, 2), (2, 3, 6),
        lambda x: x.unfold(2, 2, 2).permute(0, 2, 1, 3).reshape(-1, 6), (1, 3),
    ),
    "overlapping convolution": Case(
        lambda x, w: F.conv2d(x, w, padding=1), (5, 4, 3, 3), (2, 4, 6, 4), unfolded(3, padding=1), (1, 4)
    ),
    "dilated convolution": Case(
        lambda x, w: F.conv2d(x, w, dilation=2), (5, 4, 3, 3), (2, 4, 7, 6), unfolded(3, dilation=2), (1, 4)
    ),
    "heads in parts": Case(heads_in_parts, (3, 4, 8), (2, 6, 8), flat, (2, 3)),
    "one row apart": Case(
        lambda x, w: torch.cat([F.linear(x, part) for part in w.split([1, 6])], -1), (7, 8), (2, 6, 8), flat, (1, 2)
    ),
    "in parts": Case(in_parts, (7, 8), (2, 6, 8), lambda x: flat(torch.cat([x, x.sin()])), (1, 2)),
}  # fmt: skip


class Layer(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(case.weight, generator=generator).to(case.dtype))
        self.function = case.function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.function(x, self.weight))


def gradients(case: Case, backend: Any) -> tuple[Layer, torch.Tensor, torch.Tensor]:
    torch._dynamo.reset()
    layer, generator = Layer(case), torch.Generator().manual_seed(1)
    x = torch.randn(case.x, generator=generator).to(case.dtype).requires_grad_()
    out = torch.compile(layer, backend=backend)(x)
    out.backward(torch.randn(out.shape, generator=generator).to(case.dtype))
    return layer, x, out.detach()


@pytest.mark.parametrize(
    ("inner", "tail"), [("aot_eager", None), pytest.param("inductor", None, marks=pytest.mark.slow), ("aot_eager", 1)]
)
@pytest.mark.parametrize("name", CASES)
def test_gradient_and_statistic(name, inner, tail) -> None:
    pytest.importorskip("transformers.integrations.moe")
    case = CASES[name]
    if tail and case.dtype == torch.bfloat16:
        tail = 8  # its rows are of a multiple of 16 bytes
    reference, plain_x, expected = gradients(case, inner)
    layer, x, found = gradients(case, oasis_backend(rank=case.rank, tail=tail, inner=inner))
    assert torch.equal(found, expected)
    assert torch.equal(x.grad, plain_x.grad)
    gradient = layer.weight.grad
    assert isinstance(gradient, LowRankGrad) and gradient.features == case.features
    close = {"rtol": 2e-2, "atol": 2e-2} if case.dtype == torch.bfloat16 else {"rtol": 1e-10, "atol": 1e-10}
    frame, q = gradient.basis.detach(), gradient.subspace.basis.detach()
    assert frame.shape[1] == case.rank + (tail or 0) and torch.equal(frame[:, : case.rank], q)
    projected = as_rows(reference.weight.grad, case.features).to(q.dtype) @ frame
    torch.testing.assert_close(gradient.factor.to(q.dtype), projected, **close)
    rows = case.rows(x.detach()).to(q.dtype)
    statistic = rows.T @ (rows @ q)
    torch.testing.assert_close(gradient.subspace.statistic / statistic.norm(), statistic / statistic.norm(), **close)
    back = as_rows(gradient.to_dense(), case.features).to(q.dtype)
    torch.testing.assert_close(back, gradient.factor.to(q.dtype) @ frame.T, **close)


@pytest.mark.parametrize("name", ["batched [e, n, m]", "grouped by transformers", "patch convolution", "in parts"])
def test_a_step_moves_the_weight_along_its_basis(name) -> None:
    pytest.importorskip("transformers.integrations.moe")
    case = CASES[name]
    layer, _, _ = gradients(case, oasis_backend(rank=case.rank, inner="aot_eager"))
    before = layer.weight.detach().clone()
    gradient = layer.weight.grad
    q = gradient.basis.detach().clone()
    direction = torch.sign(gradient.factor) @ q.T  # Adam's first step is the sign of each coordinate
    OasisAdamW(layer.parameters(), lr=0.01, eps=1e-30, weight_decay=0.0, rank_scaling=False).step()
    moved = as_rows(layer.weight.detach() - before, case.features)
    torch.testing.assert_close(moved, -0.01 * direction, rtol=1e-6, atol=1e-9)


def test_a_projection_larger_than_its_activation_is_refused() -> None:
    case = copy.copy(CASES["overlapping convolution"])
    case.rank = 5  # of 4 channels
    backend = oasis_backend(rank=case.rank, inner="aot_eager")
    layer, _, _ = gradients(case, backend)
    assert not isinstance(layer.weight.grad, LowRankGrad)
    (report,) = backend.report()
    assert [row.reason for row in report.skipped] == [
        "the patches of its convolution overlap: P would be larger than X"
    ]


def test_a_rank_that_grouped_matmuls_cannot_take_is_refused() -> None:
    case = copy.copy(CASES["grouped by torch"])
    case.rank = 7
    backend = oasis_backend(rank=case.rank, inner="aot_eager")
    layer, _, _ = gradients(case, backend)
    assert not isinstance(layer.weight.grad, LowRankGrad)
    (report,) = backend.report()
    assert [row.reason for row in report.skipped] == [
        "its grouped matmul needs rows of a multiple of 16 bytes, which rank 7 does not give"
    ]
