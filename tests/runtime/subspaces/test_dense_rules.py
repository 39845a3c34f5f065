"""Rules whose gradients leave the graph dense: `sampled`, and a dense form of each other kind of rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.graph.matricization import as_rows, from_rows, smaller_side
from oasis_fx.runtime.subspaces.rules import (
    PCA,
    BatchRule,
    DrawnRule,
    PrincipalRandom,
    StatisticRule,
    register,
)
from oasis_fx.runtime.subspaces.store import STORE

from .dense_rules import (
    EACH_BATCH,
    KEPT,
    RANK,
    DenseGradientSVD,
    DenseOja,
    DensePrincipalRandom,
    DenseRandom,
    EachDCT,
)


def twice(w, x, y):
    return F.linear(x, w), F.linear(y, w)


def in_parts(w, x, y):
    upper, lower = w.split([4, 3])
    return F.linear(x, upper), F.linear(y, lower)


def in_parts_twice(w, x, y):
    upper, lower = w.split([4, 3])
    return F.linear(x, upper), F.linear(y, lower), F.linear(y, upper), F.linear(x, lower)


def in_two_graphs(w, x, y):
    first = F.linear(x, w)
    torch._dynamo.graph_break()
    return first, F.linear(y, w)


def transposed(w, x, y):
    return x @ w, y @ w


def of_experts(w, x, y):
    return torch.bmm(x, w.mT), torch.bmm(y, w.mT)


def of_experts_the_other_way(w, x, y):
    return torch.bmm(x, w), torch.bmm(y, w)


# The shape of the weight, and which of its dimensions are features.
PROGRAMS: dict[Callable, tuple[tuple[int, ...], tuple[int, int]]] = {
    twice: ((7, 6), (1, 2)),
    in_parts: ((7, 6), (1, 2)),
    in_parts_twice: ((7, 6), (1, 2)),
    in_two_graphs: ((7, 6), (1, 2)),
    transposed: ((6, 7), (0, 1)),
    of_experts: ((2, 7, 6), (2, 3)),
    of_experts_the_other_way: ((2, 6, 7), (1, 2)),
}


def of_rank(seed: int, *shape: int, rank: int = RANK) -> torch.Tensor:
    """A batch whose rows lie in a subspace of ``rank`` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(*shape[:-1], rank, generator=generator, dtype=torch.float64)
    return left @ torch.randn(rank, shape[-1], generator=generator, dtype=torch.float64)


def gradient_of(program: Callable, w: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    w.grad = None
    found = program(w, x, y)
    sum(out.float().sin().sum() if out.dtype != torch.float64 else out.sin().sum() for out in found).backward()
    return w.grad


def a_case(program: Callable, seed: int = 0):
    shape, _ = PROGRAMS[program]
    torch.manual_seed(seed)
    w = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2)
    lead = shape[:-2]
    x, y = of_rank(1, *lead, 10, 6), of_rank(2, *lead, 9, 6)
    return w, x, y


@pytest.mark.parametrize("rule", EACH_BATCH, ids=str)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_each_use_of_a_weight_has_a_basis_of_its_own(program, rule) -> None:
    """Each batch lies in a subspace of r dimensions, and the two have no dimension in common: so the gradient is exact
    where each use has its own basis, and far off with the other's."""
    w, x, y = a_case(program)
    expected = gradient_of(program, w, x, y)
    backend = oasis_backend(RANK, subspace=rule, inner="aot_eager")
    found = gradient_of(torch.compile(program, backend=backend), w, x, y)
    assert not isinstance(found, LowRankGrad) and all(report.rows for report in backend.report())
    torch.testing.assert_close(found, expected)


def test_a_coded_basis_of_each_batch_is_expanded() -> None:
    w, x, _ = a_case(twice)

    def once(w, x, y):
        return (F.linear(x, w),)

    expected = gradient_of(once, w, x, x)
    found = gradient_of(
        torch.compile(once, backend=oasis_backend(RANK, subspace=EachDCT(), inner="aot_eager")), w, x, x
    )
    rule = EachDCT()
    whole = rule.expand(torch.arange(6), 6, 6, torch.float64, torch.device("cpu"))
    q = whole[:, (x @ whole).norm(dim=0).topk(RANK).indices]
    torch.testing.assert_close(found, expected @ q @ q.T)


@pytest.mark.parametrize("rule", KEPT, ids=str)
@pytest.mark.parametrize("program", [in_parts_twice, in_two_graphs, transposed, of_experts], ids=lambda p: p.__name__)
def test_a_basis_that_is_kept_gives_the_dense_gradient_its_projection(program, rule) -> None:
    w, x, y = a_case(program)
    expected = gradient_of(program, w, x, y)
    backend = oasis_backend(RANK, subspace=rule, inner="aot_eager")
    found = gradient_of(torch.compile(program, backend=backend), w, x, y)
    assert not isinstance(found, LowRankGrad) and all(report.rows for report in backend.report())
    (subspace,) = STORE.all_of(w)
    q = subspace.basis.detach()
    weights = rule.weights(*q.shape) if rule.name == "dense_principal_random" else None
    right = q.T if weights is None else (q * weights.double()).T
    features = PROGRAMS[program][1]
    if rule.on == "gradient":
        features = smaller_side(w.shape, features)
    torch.testing.assert_close(found, from_rows(as_rows(expected, features) @ q @ right, w.shape, features))


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, dtype=torch.float64)

    def forward(self, x):
        return self.conv(x).sin().sum()


@pytest.mark.parametrize("rule", [DenseOja(), DenseRandom(), DenseGradientSVD()], ids=str)
def test_a_convolution_s(rule) -> None:
    model = Convolution()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model(x).backward()
    expected, model.conv.weight.grad = model.conv.weight.grad, None
    torch.compile(model, backend=oasis_backend(RANK, subspace=rule, inner="aot_eager"))(x).backward()
    (subspace,) = STORE.all_of(model.conv.weight)
    q = subspace.basis.detach()
    features = (1, 4) if rule.on == "activation" else (0, 1)
    expected = from_rows(as_rows(expected, features) @ q @ q.T, expected.shape, features)
    torch.testing.assert_close(model.conv.weight.grad, expected)


@pytest.mark.parametrize("rule", ["sampled", DensePrincipalRandom(), DenseGradientSVD()], ids=str)
def test_a_dense_rule_in_generated_code(rule) -> None:
    w, x, y = a_case(in_parts_twice)
    found = {}
    for inner in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        w = torch.nn.Parameter(w.detach().clone())  # with a basis of its own, from the same seed
        torch.manual_seed(5)
        backend = oasis_backend(RANK, subspace=rule, inner=inner)
        found[inner] = gradient_of(torch.compile(in_parts_twice, backend=backend), w, x, y)
    torch.testing.assert_close(found["inductor"], found["aot_eager"])


def test_class_attributes_that_contradict_each_other_are_refused() -> None:
    class Lost(BatchRule):
        name = "lost"
        each_batch = True

    class Stored(DrawnRule):
        name = "stored"
        coded = False

    class Coded(StatisticRule):
        name = "coded"
        coded = True

    class Elsewhere(BatchRule):
        name = "elsewhere"
        on = "weight"

    for rule, message in (
        (Lost(), "'lost' has each_batch = True and dense = False"),
        (Stored(), "'stored' is a DrawnRule with coded = False"),
        (Coded(), "'coded' is a StatisticRule with coded = True"),
        (Elsewhere(), "'elsewhere' has on = 'weight': it must be 'activation' or 'gradient'"),
    ):
        for use in (register, lambda rule: oasis_backend(4, subspace=rule)):
            with pytest.raises(ValueError, match=message):
                use(rule)


class Narrow(PCA):
    """Forgets that a batch may have fewer rows than r."""

    name = "narrow"

    def choose(self, batch, subspace, generator):
        return torch.linalg.qr(batch[: subspace.shape[1]].mT).Q


def test_a_rule_that_chooses_too_few_columns_is_named() -> None:
    w, x, _ = a_case(twice)
    compiled = torch.compile(
        lambda w, x: F.linear(x, w), backend=oasis_backend(RANK, subspace=Narrow(), inner="aot_eager")
    )
    with pytest.raises(RuntimeError, match=r"'narrow' chose a basis of shape \(6, 1\) from a batch of shape \(1, 6\)"):
        compiled(w, x[:1])


class Doubting(PrincipalRandom):
    name = "doubting"
    dense = True

    def weights(self, n, r):
        return -super().weights(n, r)


def test_a_dense_rule_may_not_weigh_a_column_negatively() -> None:
    w, x, _ = a_case(twice)
    compiled = torch.compile(
        lambda w, x: F.linear(x, w), backend=oasis_backend(RANK, subspace=Doubting(), inner="aot_eager")
    )
    with pytest.raises(RuntimeError, match="'doubting' has a negative weight"):
        compiled(w, x)
