"""Rules whose gradients leave the graph dense: `sampled`, and a dense form of each other kind of rule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows, from_rows, smaller_side
from oasis_fx.runtime.subspaces.basis_updates import update_bases
from oasis_fx.runtime.subspaces.rules import (
    DCT,
    PCA,
    BatchRule,
    DrawnRule,
    GradientOja,
    GradientPower,
    GradientSVD,
    Oja,
    PrincipalRandom,
    Random,
    StatisticRule,
    register,
    rule_of,
)
from oasis_fx.runtime.subspaces.store import STORE

RANK = 3


@dataclass(frozen=True)
class DenseOja(Oja):
    name: ClassVar[str] = "dense_oja"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DensePCA(PCA):
    name: ClassVar[str] = "dense_pca"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class EachPCA(PCA):
    name: ClassVar[str] = "each_pca"
    dense: ClassVar[bool] = True
    each_batch: ClassVar[bool] = True


@dataclass(frozen=True)
class EachDCT(DCT):
    name: ClassVar[str] = "each_dct"
    dense: ClassVar[bool] = True
    each_batch: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseDCT(DCT):
    name: ClassVar[str] = "dense_dct"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DensePrincipalRandom(PrincipalRandom):
    name: ClassVar[str] = "dense_principal_random"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseRandom(Random):
    name: ClassVar[str] = "dense_random"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseGradientOja(GradientOja):
    name: ClassVar[str] = "dense_gradient_oja"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseGradientSVD(GradientSVD):
    name: ClassVar[str] = "dense_gradient_svd"
    dense: ClassVar[bool] = True


@dataclass(frozen=True)
class DenseGradientPower(GradientPower):
    name: ClassVar[str] = "dense_gradient_power"
    dense: ClassVar[bool] = True


KEPT = [DenseOja(), DensePCA(), DenseDCT(), DensePrincipalRandom(), DenseRandom(),
        DenseGradientOja(), DenseGradientSVD(), DenseGradientPower(), DenseDCT("gradient")]  # fmt: skip
EACH_BATCH = ["sampled", EachPCA()]


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


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5, bias=False)
        self.double()

    def forward(self, x):
        return (self.down(torch.tanh(self.up(x))) - 1).square().mean()


def batch(step: int) -> torch.Tensor:
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("rule", KEPT, ids=str)
def test_the_basis_behind_dense_gradients_moves_as_that_behind_low_rank_ones(rule, every) -> None:
    """The same weights, batches and seeds: both bases are equal after every step, as long as the weights are."""
    low_rank = type(rule).__mro__[1]
    sided = {"side": rule.side} if isinstance(rule, DCT) else {}
    bases, compiled = {}, {}
    for made in (rule, low_rank(**sided)):
        torch.manual_seed(1)
        model = Net()
        compiled[made.dense] = torch.compile(
            model, backend=oasis_backend(RANK, subspace=rule_of(made, every=every), inner="aot_eager")
        )
        optimizer = OasisAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
        found = bases[made.dense] = []
        for step in range(4):
            compiled[made.dense](batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            (subspace,) = STORE.all_of(model.up.weight)
            found.append((subspace.basis.detach().clone(), int(subspace.num_updates)))
        if made.dense:
            assert optimizer.state[model.up.weight]["exp_avg"].shape == (8, 6)
    uses_moments = isinstance(rule, GradientPower)  # which an optimizer with states at full size has none of
    for step, (one, other) in enumerate(zip(bases[True], bases[False], strict=True)):
        assert one[1] == other[1]
        if not uses_moments or step < every:
            torch.testing.assert_close(one[0], other[0])
    assert bases[True][-1][1] > 0


@pytest.mark.parametrize("rule", KEPT, ids=str)
def test_a_dense_rule_resumes_bitwise(rule) -> None:
    backend = oasis_backend(RANK, subspace=rule_of(rule, every=2), inner="aot_eager")

    def run(model, compiled, optimizer, steps) -> None:
        for step in steps:
            compiled(batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(1)
    model = Net()
    compiled, optimizer = torch.compile(model, backend=backend), OasisAdamW(model.parameters(), lr=1e-2)
    run(model, compiled, optimizer, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, compiled, optimizer, range(3, 7))
    again = Net()
    compiled, optimizer = torch.compile(again, backend=backend), OasisAdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run(again, compiled, optimizer, range(3, 7))
    for found, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["random", "dct"])
def test_a_coded_basis_under_states_of_full_size_is_in_the_checkpoint(rule) -> None:
    backend = oasis_backend(RANK, subspace=rule, inner="aot_eager")
    torch.manual_seed(1)
    model = Net()
    optimizer = OasisAdamW(model.parameters(), lr=1e-2, full_size_states=True)
    torch.compile(model, backend=backend)(batch(0)).backward()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    again = Net()
    other = OasisAdamW(again.parameters(), lr=1e-2, full_size_states=True)
    other.load_state_dict(saved)
    torch.manual_seed(2)
    torch.compile(again, backend=backend)(batch(1).mul(0)).backward()  # of zeros: it moves none
    (one,), (two,) = STORE.all_of(model.up.weight), STORE.all_of(again.up.weight)
    assert torch.equal(one.basis, two.basis) and int(one.num_updates) == int(two.num_updates)


@pytest.mark.parametrize("rule", [DenseOja(), DensePCA(), DenseRandom(), DenseGradientOja()], ids=str)
def test_another_optimizer_moves_them_by_update_bases(rule) -> None:
    model = Net()
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule_of(rule, every=1), inner="aot_eager"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(3):
        compiled(batch(step)).backward()
        optimizer.step()
        update_bases(model.parameters())
        optimizer.zero_grad()
    (subspace,) = STORE.all_of(model.up.weight)
    assert int(subspace.num_updates) == 3


def test_a_step_between_forward_and_backward_is_refused_or_right() -> None:
    """The graph keeps the basis that it projected on; one that has moved in place is not taken for it."""
    for rule in (DenseOja(), DenseRandom(), DensePCA()):
        torch._dynamo.reset()
        model = Net()
        compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule_of(rule, every=1), inner="aot_eager"))
        plain = Net()
        plain(batch(0)).backward()
        early = compiled(batch(0))
        (subspace,) = STORE.all_of(model.up.weight)
        q = subspace.basis.detach().clone()
        compiled(batch(1)).backward()
        update_bases(model.parameters())
        model.zero_grad()
        if rule.name == "dense_oja":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                early.backward()
            continue
        early.backward()
        torch.testing.assert_close(model.up.weight.grad, plain.up.weight.grad @ q @ q.T)


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
    with pytest.raises(RuntimeError, match="'doubting' has a weight under 0"):
        compiled(w, x)
