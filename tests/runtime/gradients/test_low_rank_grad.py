"""A low-rank gradient behaves as the matrix that it stands for, or refuses."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch

from oasis_fx.graph.matricization import LINEAR
from oasis_fx.runtime.gradients import at_full_size as module
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad, LowRankGradWarning, _rebuild
from oasis_fx.runtime.gradients.slots import Group, lend
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

SPEC = SubspaceSpec(3)


@pytest.fixture(autouse=True)
def no_warning_seen_yet(monkeypatch):
    monkeypatch.setattr(module, "_warned", set())


def gradient(m=5, n=8, *, seed=0, transposed=False, dtype=torch.float64, subspace=None) -> LowRankGrad:
    generator = torch.Generator().manual_seed(seed)
    features = (0, 1) if transposed else (1, 2)
    weight = torch.nn.Parameter(torch.zeros((n, m) if transposed else (m, n), dtype=dtype))
    subspace = subspace or STORE.resolve([weight], SPEC, [features])
    factor = torch.randn(m, 3, generator=generator, dtype=torch.float64).to(dtype)
    return LowRankGrad(factor, subspace, weight, features=features)


def silent(function, *args, **kwargs):
    """Call without a full-size matrix being made: that would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowRankGradWarning)
        return function(*args, **kwargs)


def test_a_pickle_of_the_version_before_loads() -> None:
    g = gradient()
    old = g.factor, g.basis, None, SPEC, g.shape, g.stride(), g.features, False
    assert torch.equal(_rebuild(*old).to_dense(), g.to_dense())
    assert torch.equal(pickle.loads(pickle.dumps(g)).to_dense(), g.to_dense())


@pytest.mark.parametrize("transposed", [False, True])
def test_stands_for_factor_times_basis(transposed) -> None:
    g = gradient(transposed=transposed)
    dense = g.factor @ g.basis.T
    torch.testing.assert_close(g.to_dense(), dense.T if transposed else dense)
    assert g.shape == g.to_dense().shape and g.dtype == torch.float64 and "rank=3" in repr(g)


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g.norm(),
        lambda g: torch.linalg.vector_norm(g),
        lambda g: torch._foreach_norm([g, g])[1],
        lambda g: g * 2.0,
        lambda g: 2.0 * g,
        lambda g: g / 4,
        lambda g: g * torch.tensor(0.5, dtype=torch.float64),
        lambda g: g.clone(),
        lambda g: g.detach(),
        lambda g: g + g.clone(),
        lambda g: torch.add(g, g.clone(), alpha=-0.5),
        lambda g: g.to(torch.float32),
        lambda g: copy.deepcopy(g),
        lambda g: pickle.loads(pickle.dumps(g)),
    ],
)
def test_operations_on_the_factor_are_exact_and_make_no_matrix(operation) -> None:
    g = gradient()
    expected = operation(g.to_dense().clone())
    result = silent(operation, g)
    if isinstance(result, LowRankGrad):
        assert result.factor.shape == (5, 3)
        result = result.to_dense()
    tolerance = 1e-6 if result.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: g.mul_(0.5),
        lambda g: g.div_(2),
        lambda g: g.mul_(torch.tensor(3.0, dtype=torch.float64)),
        lambda g: g.zero_(),
        lambda g: g.add_(g.clone()),
        lambda g: torch._foreach_mul_([g], 0.5),
        lambda g: torch._foreach_mul_([g], torch.tensor(0.5, dtype=torch.float64)),
        lambda g: torch._foreach_zero_([g]),
    ],
)
def test_in_place_operations_on_the_factor(operation) -> None:
    g = gradient()
    expected = g.to_dense().clone()
    operation(expected)
    silent(operation, g)
    assert g.basis is not None
    torch.testing.assert_close(g.to_dense(), expected)


@pytest.mark.parametrize(
    "operation",
    [
        lambda g: torch.isfinite(g),
        lambda g: g.abs().max(),
        lambda g: g.norm(1),
        lambda g: g.norm(float("inf")),
        lambda g: g.norm(dim=0),
        lambda g: g.sum(),
        lambda g: g @ torch.ones(8, 2, dtype=torch.float64),
        lambda g: g + torch.ones(5, 8, dtype=torch.float64),
        lambda g: torch.ones(5, 8, dtype=torch.float64) + g,
        lambda g: g * torch.ones(8, dtype=torch.float64),
        lambda g: torch.ones(5, 8, dtype=torch.float64).add_(g),
        lambda g: torch.zeros(5, 8, dtype=torch.float64).copy_(g),
    ],
)
def test_other_operations_are_right_and_warn_once(operation) -> None:
    g = gradient()
    expected = operation(g.to_dense())
    with pytest.warns(LowRankGradWarning, match="full-size matrix"):
        result = operation(g)
    assert not isinstance(result, LowRankGrad)
    torch.testing.assert_close(result, expected)
    silent(operation, g)


def test_adding_a_dense_gradient_in_place_turns_dense_exactly() -> None:
    g, dense = gradient(), torch.randn(5, 8, dtype=torch.float64)
    expected = g.to_dense() + dense
    with pytest.warns(LowRankGradWarning, match="turned dense"):
        g.add_(dense)
    assert g.basis is None and "dense" in repr(g)
    torch.testing.assert_close(g.to_dense(), expected)
    torch.testing.assert_close(silent(g.norm), expected.norm())
    silent(g.mul_, 2.0)
    torch.testing.assert_close(g.to_dense(), 2 * expected)


def test_adding_a_gradient_of_another_basis_in_place_turns_dense_exactly() -> None:
    g, other = gradient(), gradient(seed=1)
    expected = g.to_dense() + other.to_dense()
    with pytest.warns(LowRankGradWarning):
        g.add_(other)
    torch.testing.assert_close(g.to_dense(), expected)


def test_copy_takes_over_coordinates_or_turns_dense() -> None:
    g, other = gradient(), gradient(seed=1)
    g.copy_(other)
    torch.testing.assert_close(g.to_dense(), other.to_dense())
    dense = torch.randn(5, 8, dtype=torch.float64)
    with pytest.warns(LowRankGradWarning):
        g.copy_(dense)
    torch.testing.assert_close(g.to_dense(), dense)
    assert g.factor.data_ptr() != dense.data_ptr()


def test_bfloat16() -> None:
    g = gradient(dtype=torch.bfloat16)
    assert g.dtype == g.to_dense().dtype == torch.bfloat16
    torch.testing.assert_close(g.to_dense().float(), (g.factor.float() @ g.basis.T), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_grad_norm(foreach, products, make_weight) -> None:
    weights = [make_weight(5, 8, seed=1), make_weight(5, 8, seed=2)]
    bias = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    for y in products(torch.randn(20, 8, dtype=torch.float64), weights, SPEC):
        (y + bias).square().sum().backward()
    dense = [torch.nn.Parameter(torch.zeros_like(p)) for p in (*weights, bias)]
    for p, q in zip((*weights, bias), dense, strict=True):
        q.grad = (p.grad.to_dense() if isinstance(p.grad, LowRankGrad) else p.grad).clone()
    expected = torch.nn.utils.clip_grad_norm_(dense, 1.0)
    norm = torch.nn.utils.clip_grad_norm_([*weights, bias], 1.0, foreach=foreach)
    torch.testing.assert_close(norm, expected)
    for p, q in zip((*weights, bias), dense, strict=True):
        found = p.grad.to_dense() if isinstance(p.grad, LowRankGrad) else p.grad
        torch.testing.assert_close(found, q.grad)
    assert isinstance(weights[0].grad, LowRankGrad)


@pytest.mark.filterwarnings("ignore:.*full-size matrix")  # SGD makes one
def test_grad_scaler_unscales_and_sees_infinities(products, make_weight) -> None:
    w = make_weight(5, 8, dtype=torch.float32)
    optimizer = torch.optim.SGD([w], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(20, 8)
    (y,) = products(x, [w], SPEC)
    scaler.scale(y.sum()).backward()
    scaled = w.grad.factor.clone()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(w.grad.factor, scaled / 1024)
    assert sum(scaler._found_inf_per_device(optimizer).values()) == 0
    scaler.step(optimizer), scaler.update()
    w.grad = None
    (y,) = products(x * float("inf"), [w], SPEC)
    scaler.scale(y.sum()).backward()
    scaler.unscale_(optimizer)
    assert sum(scaler._found_inf_per_device(optimizer).values()) == 1


def test_accumulation_adds_factors_and_zero_grad_clears(products, make_weight) -> None:
    w = make_weight(5, 8)
    batches = [torch.randn(20, 8, dtype=torch.float64) for _ in range(3)]
    expected = 0
    for x in batches:
        (y,) = products(x, [w], SPEC)
        silent(y.square().sum().backward)
        expected = expected + (2 * y.detach()).T @ x
    assert isinstance(w.grad, LowRankGrad)
    torch.testing.assert_close(w.grad.factor, expected @ w.grad.basis.detach())
    torch.optim.SGD([w], lr=0.1).zero_grad(set_to_none=False)
    assert isinstance(w.grad, LowRankGrad) and w.grad.norm() == 0
    (y,) = products(batches[0], [w], SPEC)
    y.sum().backward()
    assert w.grad.basis is not None and w.grad.norm() > 0


def test_two_uses_in_one_backward_add_up(products, make_weight) -> None:
    w = make_weight(5, 8)
    x1, x2 = torch.randn(2, 20, 8, dtype=torch.float64)
    (y1,), (y2,) = products(x1, [w], SPEC), products(x2, [w], SPEC)
    silent((y1.sum() + 2 * y2.sum()).backward)
    ones = torch.ones(20, 5, dtype=torch.float64)
    torch.testing.assert_close(w.grad.factor, (ones.T @ x1 + 2 * ones.T @ x2) @ w.grad.basis.detach())


def test_retain_graph_doubles(products, make_weight) -> None:
    w = make_weight(5, 8)
    (y,) = products(torch.randn(20, 8, dtype=torch.float64), [w], SPEC)
    loss = y.square().sum()
    loss.backward(retain_graph=True)
    once = w.grad.factor.clone()
    loss.backward()
    torch.testing.assert_close(w.grad.factor, 2 * once)


def test_autograd_grad_and_hooks_see_the_parameters_gradient(products, make_weight) -> None:
    w = make_weight(5, 8)
    seen = []
    w.register_hook(lambda g: seen.append(("tensor", type(g))))
    w.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", type(p.grad))))
    x = torch.randn(20, 8, dtype=torch.float64)
    (y,) = products(x, [w], SPEC)
    (found,) = torch.autograd.grad(y.sum(), [w], retain_graph=True)
    assert isinstance(found, LowRankGrad) and w.grad is None
    y.sum().backward()
    assert seen == [("tensor", LowRankGrad), ("tensor", LowRankGrad), ("accumulated", LowRankGrad)]


def test_a_hook_may_scale(products, make_weight) -> None:
    w = make_weight(5, 8)
    w.register_hook(lambda g: g * 0.5)
    (y,) = products(torch.ones(2, 8, dtype=torch.float64), [w], SPEC)
    y.sum().backward()
    expected = 0.5 * torch.full((5, 8), 2.0, dtype=torch.float64) @ w.grad.basis.detach()
    torch.testing.assert_close(w.grad.factor, expected)


def test_a_basis_that_moves_before_backward_is_an_error(products, make_weight) -> None:
    w = make_weight(5, 8)
    x = torch.randn(20, 8, dtype=torch.float64)
    (y,) = products(x, [w], SPEC)
    subspace = STORE.existing(w, SPEC)
    with torch.no_grad():
        subspace.basis.copy_(subspace.basis.flip(0))
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|moved between"):
        y.sum().backward()


def test_slots_check_the_version_themselves(make_weight) -> None:
    # Where a compiled graph saves P and not Q, autograd has nothing that would notice.
    w = make_weight(5, 8)
    subspace = STORE.resolve([w], SPEC, [LINEAR])
    (slot,) = lend([Group(subspace, (w,), (LINEAR,))]).slots
    with torch.no_grad():
        subspace.basis.mul_(1.0)
    with pytest.raises(RuntimeError, match="moved between"):
        slot.backward(torch.ones(5, 3, dtype=torch.float64))


def test_one_factor_given_to_two_weights_is_copied(make_weight) -> None:
    weights = [make_weight(5, 8), make_weight(5, 8)]
    subspace = STORE.resolve(weights, SPEC, [LINEAR] * 2)
    slots = lend([Group(subspace, tuple(weights), (LINEAR, LINEAR))]).slots
    shared = torch.ones(5, 3, dtype=torch.float64)
    torch.autograd.backward(slots, [shared, shared])
    weights[0].grad.mul_(7)
    assert weights[1].grad.factor.max() == 1


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, lambda p, lr: torch.optim.AdamW(p, lr, fused=True)]
)
def test_stock_optimizers_are_right(make, products, make_weight) -> None:
    w = make_weight(5, 8)
    dense = torch.nn.Parameter(w.detach().clone())
    one, other = make([w], lr=0.1), make([dense], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LowRankGradWarning)
        for seed in range(3):
            x = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            (y,) = products(x, [w], SPEC)
            y.square().sum().backward()
            dense.grad = w.grad.to_dense().clone()
            one.step(), other.step()
            one.zero_grad(), other.zero_grad()
    torch.testing.assert_close(w, dense)


def test_save_and_load() -> None:
    g = gradient()
    file = io.BytesIO()
    torch.save(g, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded.to_dense(), g.to_dense())
