"""The rules in whole models: code generation, bfloat16, budgets, layouts, what is reported."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.graph.matricization import as_rows
from oasis_fx.inspect.measure import gradient_bytes, optimizer_bytes, saved_for_backward_bytes
from oasis_fx.runtime.subspaces.rules import DCT, GradientPower, PrincipalRandom, rule_of
from tests.rules import moving_every

OF_ACTIVATIONS = ["oja", "pca", "random", "principal_random", "sampled", "dct"]
OF_GRADIENTS = ["gradient_svd", "gradient_oja", "gradient_power", DCT("gradient")]
ALL = [*OF_ACTIVATIONS, *OF_GRADIENTS]


class Block(torch.nn.Module):
    """q, k and v read one activation; the weight of ``mix`` is stored n x m."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (torch.nn.Linear(width, width) for _ in range(3))
        self.mix = torch.nn.Parameter(torch.randn(width, 2 * width) / width**0.5)
        self.down = torch.nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        a = torch.softmax(self.q(x) @ self.k(x).mT, dim=-1) @ self.v(x)
        return x + self.down(torch.nn.functional.silu(a @ self.mix))


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(model, compiled, steps: int, dtype: torch.dtype = torch.float32) -> list[float]:
    optimizer, losses = OasisAdamW(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        loss = (compiled(inputs(0, dtype)).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_generated_code_trains_as_the_graphs_node_by_node(rule) -> None:
    found = {}
    for inner in ("inductor", "aot_eager"):
        torch._dynamo.reset()
        torch.manual_seed(5)
        model = Block()
        backend = oasis_backend(4, subspace=moving_every(rule, 2), inner=inner)
        found[inner] = train(model, torch.compile(model, backend=backend), 5)
    assert found["inductor"][-1] < found["inductor"][0]
    assert found["inductor"] == pytest.approx(found["aot_eager"], rel=1e-3)


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_forward_and_unrewritten_gradients_are_exact(rule) -> None:
    torch._dynamo.reset()
    model, plain = Block().double(), Block().double()
    x, y = (inputs(0, torch.float64).requires_grad_() for _ in range(2))
    compiled = torch.compile(model, backend=oasis_backend(4, subspace=rule, inner="aot_eager"))
    out, expected = compiled(x), plain(y)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-12)
    low_rank = 0
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if isinstance(weight.grad, LowRankGrad):
            low_rank += 1
            rule_of_it, q = weight.grad.subspace.spec.rule, weight.grad.basis.detach()
            weights = rule_of_it.weights(*q.shape) if hasattr(rule_of_it, "weights") else None
            projection = q if weights is None else q * weights.double()
            torch.testing.assert_close(weight.grad.factor, as_rows(other.grad, weight.grad.features) @ projection)
        elif rule != "sampled" or weight.dim() == 1:
            torch.testing.assert_close(weight.grad, other.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert low_rank == (0 if rule == "sampled" else 5)


@pytest.mark.parametrize("rule", ALL, ids=str)
def test_bfloat16(rule) -> None:
    torch._dynamo.reset()
    model = Block().bfloat16()
    compiled = torch.compile(model, backend=oasis_backend(4, subspace=rule, inner="aot_eager"))
    losses = train(model, compiled, 6, torch.bfloat16)
    assert losses[-1] < losses[0]
    for weight in model.parameters():
        assert weight.dtype == torch.bfloat16 and bool(weight.isfinite().all())


@pytest.mark.parametrize("rule", OF_ACTIVATIONS, ids=str)
def test_a_budget_changes_no_gradient(rule) -> None:
    gradients = {}
    for budget in (1.0, 0.2):
        torch._dynamo.reset()
        torch.manual_seed(5)
        model = Block().double()
        backend = oasis_backend(4, subspace=rule, memory_budget=budget, inner="aot_eager")
        loss = torch.compile(model, backend=backend)(inputs(0, torch.float64)).square().sum()
        loss.backward()
        gradients[budget] = [
            p.grad.to_dense() if isinstance(p.grad, LowRankGrad) else p.grad for p in model.parameters()
        ]
    for one, other in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(one, other)


def test_weights_that_read_one_activation_share_a_basis_and_gradients_do_not() -> None:
    for rule, count in (("pca", 3), ("gradient_svd", 5)):
        torch._dynamo.reset()
        model = Block()
        backend = oasis_backend(4, subspace=rule, inner="aot_eager")
        torch.compile(model, backend=backend)(inputs(0)).sum().backward()
        assert len(backend.stats()) == count
        (report,) = backend.report()
        assert len(report.rows) == 5 and str(report)


def test_gradients_are_projected_on_the_smaller_side() -> None:
    torch._dynamo.reset()
    model = Block()
    backend = oasis_backend(4, subspace="gradient_svd", inner="aot_eager")
    torch.compile(model, backend=backend)(inputs(0)).sum().backward()
    assert model.down.weight.grad.features == (0, 1) and model.down.weight.grad.factor.shape == (32, 4)
    assert model.mix.grad.features == (0, 1) and model.mix.grad.factor.shape == (32, 4)
    assert model.q.weight.grad.features == (1, 2)


def test_what_is_kept_where() -> None:
    """Rules of X keep less for the backward pass, rules of dW as much; gradients and states are small in both."""
    sizes = {}
    for rule in ("none", "pca", "gradient_svd", "sampled"):
        torch._dynamo.reset()
        width = 64
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(3)))
        backend = "aot_eager" if rule == "none" else oasis_backend(4, subspace=rule, inner="aot_eager")
        x = torch.randn(512, width)
        out = torch.compile(model, backend=backend)(x).square().sum()
        saved = saved_for_backward_bytes(out, [x, *model.parameters()])
        out.backward()
        optimizer = OasisAdamW(model.parameters())
        optimizer.step()
        sizes[rule] = saved, gradient_bytes(model.parameters()), optimizer_bytes(optimizer)
    dense = 3 * 64 * 64 * 4
    assert sizes["pca"][0] < 0.5 * sizes["none"][0] and sizes["sampled"][0] < 0.6 * sizes["none"][0]
    assert sizes["gradient_svd"][0] >= 0.9 * sizes["none"][0]
    assert sizes["pca"][1] == sizes["gradient_svd"][1] == dense // 16 and sizes["sampled"][1] == dense
    assert sizes["pca"][2] < 0.25 * 2 * dense and sizes["gradient_svd"][2] < 0.25 * 2 * dense
    assert 2 * dense <= sizes["sampled"][2] < 2 * dense + 100


class Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = torch.nn.Conv2d(6, 16, 3, padding=1), torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("rule", ["oja", "random", "pca", "gradient_svd", "gradient_oja"])
def test_convolutions(rule) -> None:
    torch._dynamo.reset()
    model, plain = Convolution().double(), Convolution().double()
    backend = oasis_backend(4, subspace=rule, inner="aot_eager")
    x = torch.randn(5, 6, 7, 7, dtype=torch.float64)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    plain(x).square().sum().backward()
    gradient = model.conv.weight.grad
    if rule == "pca":
        assert not isinstance(gradient, LowRankGrad)
        torch.testing.assert_close(gradient, plain.conv.weight.grad)
        assert "are never laid out" in str(backend.report()[0])
    else:
        dense = as_rows(plain.conv.weight.grad, gradient.features)
        torch.testing.assert_close(gradient.factor, dense @ gradient.basis.detach())


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Parameter(torch.randn(3, 8, 12) / 3)

    def forward(self, x):
        return torch.bmm(x, self.up)


@pytest.mark.parametrize("rule", ["pca", "dct", "random", "gradient_svd", "sampled"])
def test_experts(rule) -> None:
    torch._dynamo.reset()
    model, plain = Experts().double(), Experts().double()
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    torch.manual_seed(1)
    torch.compile(model, backend=oasis_backend(3, subspace=rule, inner="aot_eager"))(x).square().sum().backward()
    plain(x).square().sum().backward()
    gradient, dense = model.up.grad, plain.up.grad
    if rule == "sampled":
        assert gradient.shape == dense.shape
        rows = as_rows(gradient, (1, 2))
        assert int(torch.linalg.matrix_rank(rows)) == 3
        q = torch.linalg.svd(rows, full_matrices=False).Vh[:3].T
        torch.testing.assert_close(rows, as_rows(dense, (1, 2)) @ q @ q.T)
    else:
        torch.testing.assert_close(gradient.factor, as_rows(dense, gradient.features) @ gradient.basis.detach())


def test_two_forward_passes_before_their_backward_passes() -> None:
    torch._dynamo.reset()
    model, plain = Block().double(), Block().double()
    compiled = torch.compile(model, backend=oasis_backend(4, subspace="pca", inner="aot_eager"))
    losses = [compiled(inputs(seed, torch.float64)).square().sum() for seed in (0, 1)]
    for loss in reversed(losses):
        loss.backward()
    for seed in (0, 1):
        plain(inputs(seed, torch.float64)).square().sum().backward()
    gradient = model.q.weight.grad
    torch.testing.assert_close(gradient.factor, plain.q.weight.grad @ gradient.basis.detach())


def test_a_backward_pass_after_its_basis_has_moved_is_refused() -> None:
    torch._dynamo.reset()
    model = Block().double()
    compiled = torch.compile(model, backend=oasis_backend(4, subspace=rule_of("pca", every=1), inner="aot_eager"))
    late = compiled(inputs(0, torch.float64)).square().sum()
    compiled(inputs(1, torch.float64)).square().sum().backward()
    subspace = model.q.weight.grad.subspace
    model.zero_grad()
    subspace.steps_since_due.fill_(1)  # its turn comes again, as after a step of an optimizer
    compiled(inputs(2, torch.float64)).square().sum().backward()
    with pytest.raises(RuntimeError, match="moved between the forward and the backward pass"):
        late.backward()


def test_a_batch_that_is_not_finite_moves_no_basis() -> None:
    torch._dynamo.reset()
    model = Block()
    compiled = torch.compile(model, backend=oasis_backend(4, subspace="pca", inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters())
    train(model, compiled, 1)
    loss = compiled(inputs(0)).square().sum()
    loss.backward()
    subspace = model.q.weight.grad.subspace
    updates = int(subspace.num_updates)
    optimizer.step()
    subspace.steps_since_due.fill_(subspace.spec.rule.every)
    (compiled(inputs(1) * torch.inf)).sum().backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert int(subspace.num_updates) == updates and bool(subspace.basis.isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrincipalRandom(principal=1.0), "principal is 1.0: it must be a share over 0 and under 1"),
        (lambda: GradientPower(rho=1.0), "rho is 1.0: it must be a number from 0 and under 1"),
        (lambda: DCT("weight"), "side is 'weight': it must be 'activation' or 'gradient'"),
        (lambda: oasis_backend(subspace=3), "subspace is 3: it must be one of"),
    ],
)
def test_bad_settings(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_report_counts_what_each_rule_leaves() -> None:
    found = {}
    for rule in ("oja", "pca", "dct", "sampled", "gradient_svd", "gradient_oja"):
        torch._dynamo.reset()
        backend = oasis_backend(4, subspace=rule, inner="aot_eager")
        torch.compile(Block(), backend=backend)(inputs(0)).sum().backward()
        (found[rule],) = backend.report()
    totals = {rule: report.totals for rule, report in found.items()}
    dense = (3 * 16 * 16 + 2 * 16 * 32) * 4
    factors = (3 * 16 + 16 + 32) * 4 * 4  # of q, k, v: m = 16; of down: 16; of mix: 32
    bases = (16 + 16 + 32) * 4 * 4
    assert all(t.gradient_bytes_before == dense and t.adam_bytes_before == 2 * dense for t in totals.values())
    assert totals["oja"].gradient_bytes_after == factors + bases  # G and C
    assert totals["pca"].gradient_bytes_after == factors
    assert totals["oja"].adam_bytes_after == totals["pca"].adam_bytes_after == 2 * factors + bases
    assert totals["dct"].adam_bytes_after == 2 * factors  # its basis is a few integers
    assert totals["sampled"].gradient_bytes_after == dense and totals["sampled"].adam_bytes_after == 2 * dense
    on_smaller_side = (3 * 16 + 2 * 32) * 4 * 4
    assert totals["gradient_svd"].gradient_bytes_after == on_smaller_side
    assert totals["gradient_oja"].gradient_bytes_after == on_smaller_side + 5 * 16 * 4 * 4
    rows = found["gradient_svd"].rows
    assert [row.note for row in rows] == ["dW projected"] * 5
    assert "dW is computed at full size" in str(found["gradient_svd"])
