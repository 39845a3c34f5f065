"""Steps along a tail against the formula written out in dense float64 matrices, and what goes along with tails."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.subspaces import host_reads

MAKERS = {
    "AdamW": lambda params: OasisAdamW(params, lr=0.05, weight_decay=0.1),
    "Lion": lambda params: OasisLion(params, lr=0.05, weight_decay=0.1),
    "SGD": lambda params: OasisSGD(params, lr=0.05, weight_decay=0.1),
    "Muon": lambda params: OasisMuon(params, lr=0.05, weight_decay=0.1),
}
N, R, T = 10, 3, 2


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(N, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(16, N, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def compiled(model: torch.nn.Module, **settings) -> torch.nn.Module:
    settings = {"rank": R, "tail": T, "include": "0.*", "inner": "aot_eager"} | settings
    return torch.compile(model, backend=oasis_backend(**settings))


def train(model, optimizer, steps: int, first: int = 0, run=None) -> None:
    run = run or compiled(model)
    for step in range(first, first + steps):
        run(batch(step, model[0].weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", MAKERS)
def test_the_step_is_that_without_a_tail_and_the_formula(name) -> None:
    """A second optimizer, whose backend draws no tail, gives U Q^T; what is left of the step is that along T."""
    model = net()
    optimizer, run = MAKERS[name](model.parameters()), compiled(model)
    for step in range(3):
        plain = copy.deepcopy(model)
        theirs = MAKERS[name](plain.parameters())
        theirs.load_state_dict(optimizer.state_dict())
        twin = compiled(plain, tail=None)
        for one in (run, twin):
            one(batch(step)).square().mean().backward()
        weight, gradient = model[0].weight, model[0].weight.grad
        assert isinstance(gradient, LowRankGrad) and gradient.factor.shape == (6, R + T)
        inside, outside = gradient.factor[:, :R].clone(), gradient.factor[:, R:].clone()
        torch.testing.assert_close(inside, plain[0].weight.grad.factor)
        frame, before = gradient.basis.detach().clone(), weight.detach().clone()
        optimizer.step(), theirs.step()
        # U, from the step of the twin.
        decayed = (1 - 0.05 * 0.1) * before
        scaled = (plain[0].weight.detach() - decayed) @ frame[:, :R]  # -lr s U
        c, lengths = (N - R) / T, scaled.norm(dim=1)
        if name == "SGD":
            share, whole = 1.0, torch.maximum(inside.norm(dim=1), math.sqrt(R / T) * outside.norm(dim=1))
        else:
            whole = (inside.norm(dim=1) ** 2 + c * outside.norm(dim=1) ** 2).sqrt()
            share = (inside.norm(dim=1) / whole)[:, None]
        along = -c * (lengths / whole)[:, None] * outside @ frame[:, R:].T
        expected = decayed + share * scaled @ frame[:, :R].T + along
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-8, atol=1e-10)
        assert along.norm() > 1e-3
        optimizer.zero_grad()


@pytest.mark.parametrize("rank_scaling", [True, False])
def test_a_row_that_the_basis_does_not_see_takes_no_huge_step(rank_scaling) -> None:
    model = net()
    settings = {"lr": 0.01, "weight_decay": 0.0, "rank_scaling": rank_scaling}
    optimizer, run = OasisAdamW(model.parameters(), **settings), compiled(model)
    train(model, optimizer, 3, run=run)
    run(batch(9)).square().mean().backward()
    model[0].weight.grad.factor[0, :R] = 0.0
    model[0].weight.grad.factor[1] = 0.0  # as of a unit that no token has used, while its moments go on
    before = model[0].weight.detach().clone()
    optimizer.step()
    moved = (model[0].weight.detach() - before).norm(dim=1)
    assert moved[0] < 3 * moved[2:].max() and 0 < moved[1] < moved[2:].max()


def test_a_tail_does_not_lengthen_the_steps_of_adamw() -> None:
    """Where the basis sees little of the gradient, too: a first step has the length of AdamW's, whatever r and t."""
    torch.manual_seed(0)
    n, m = 96, 64
    lengths = {}
    for rank, tail in ((4, 8), (4, None), (8, 80)):
        torch._dynamo.reset()
        model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False))
        run = compiled(model, rank=rank, tail=tail, include=None)
        optimizer = OasisAdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        before = model[0].weight.detach().clone()
        run(torch.randn(400, n)).square().mean().backward()
        assert isinstance(model[0].weight.grad, LowRankGrad)
        optimizer.step()
        lengths[rank, tail] = float((model[0].weight.detach() - before).norm()) / (0.01 * math.sqrt(m * n))
    assert lengths[4, None] == pytest.approx(1.0, rel=1e-3)
    assert lengths[8, 80] == pytest.approx(1.0, rel=0.15)
    assert lengths[4, 8] < 1.1 * math.sqrt((n - 4) / 8)  # eight columns stand for 92: longer by the noise of that


def test_the_norm_of_a_gradient_counts_its_tail() -> None:
    model = net()
    compiled(model)(batch(0)).square().mean().backward()
    gradient = model[0].weight.grad
    torch.testing.assert_close(gradient.norm(), gradient.to_dense().norm(), rtol=1e-10, atol=0)
    before = gradient.to_dense()
    torch.nn.utils.clip_grad_norm_([model[0].weight], 1e-3)
    torch.testing.assert_close(gradient.to_dense(), before * (1e-3 / before.norm()), rtol=1e-4, atol=0)


def test_micro_batches_share_one_tail() -> None:
    model = net()
    run = compiled(model)
    for step in range(2):
        run(batch(step)).square().mean().backward()
    reference = net()
    for step in range(2):
        reference(batch(step)).square().mean().backward()
    gradient = model[0].weight.grad
    torch.testing.assert_close(gradient.factor, reference[0].weight.grad @ gradient.basis.detach())


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path) -> None:
    whole = net()
    optimizer = MAKERS[name](whole.parameters())
    train(whole, optimizer, 3)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    train(whole, optimizer, 3, first=3)
    torch._dynamo.reset()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    resumed = net(seed=1)
    torch.randn(7)  # what torch's own generator is asked for in between does not matter
    resumed.load_state_dict(saved["model"])
    other = MAKERS[name](resumed.parameters())
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, 3, first=3)
    for weight, again in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, again)


def test_a_checkpoint_without_a_tail_loads_and_one_with_a_tail_goes_on_without() -> None:
    for saved_tail, tail in ((None, T), (T, None), (T, T + 1)):
        torch._dynamo.reset()
        model = net()
        optimizer = OasisAdamW(model.parameters(), lr=0.01)
        train(model, optimizer, 2, run=compiled(model, tail=saved_tail))
        other = copy.deepcopy(model)
        theirs = OasisAdamW(other.parameters(), lr=0.01)
        theirs.load_state_dict(optimizer.state_dict())
        run = compiled(other, tail=tail)
        run(batch(5)).square().mean().backward()
        gradient = other[0].weight.grad
        assert gradient.factor.shape[1] == R + (tail or 0)
        frame = gradient.basis.detach()
        torch.testing.assert_close(frame.T @ frame, torch.eye(frame.shape[1], dtype=torch.float64))
        theirs.step()


def test_a_change_of_rank_keeps_the_tail_outside() -> None:
    model = net()
    optimizer, run = OasisAdamW(model.parameters(), lr=0.01), compiled(model)
    train(model, optimizer, 2, run=run)
    for rank in (2, 6, 9):
        optimizer.resize_rank(rank)
        run(batch(5)).square().mean().backward()
        gradient = model[0].weight.grad
        assert gradient.factor.shape[1] == min(rank + T, N)
        frame = gradient.basis.detach()
        torch.testing.assert_close(frame.T @ frame, torch.eye(frame.shape[1], dtype=torch.float64))
        optimizer.step(), optimizer.zero_grad()


def test_a_dense_gradient_is_projected_on_the_tail_too() -> None:
    model = net()
    twin = copy.deepcopy(model)
    optimizers = [OasisAdamW(each.parameters(), lr=0.01) for each in (model, twin)]
    runs = [compiled(each) for each in (model, twin)]
    for step in range(3):
        for run in runs:
            run(batch(step)).square().mean().backward()
        if step == 2:
            dense = net()
            dense.load_state_dict(twin.state_dict())
            dense(batch(step)).square().mean().backward()
            twin[0].weight.grad = dense[0].weight.grad
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    torch.testing.assert_close(model[0].weight, twin[0].weight, rtol=1e-8, atol=1e-10)


def test_one_gradient_may_be_stepped_on_twice() -> None:
    """Of the second tail it has no coordinates: the second step is one in the basis alone."""
    model = net()
    optimizer, run = OasisSGD(model.parameters(), lr=0.1, momentum=0.0), compiled(model)
    run(batch(0)).square().mean().backward()
    optimizer.step()
    before, basis = model[0].weight.detach().clone(), model[0].weight.grad.subspace.basis.detach().clone()
    optimizer.step()
    moved = model[0].weight.detach() - before
    assert moved.norm() > 0
    torch.testing.assert_close(moved @ basis @ basis.T, moved)


@pytest.mark.parametrize("bits", [32, 8])
def test_states_have_the_columns_of_the_basis_alone(bits) -> None:
    if bits == 8:
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256))
    run = torch.compile(model, backend=oasis_backend(rank=16, tail=8, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), state_bits=bits)
    for _ in range(2):
        run(torch.randn(32, 64)).square().mean().backward()
        optimizer.step(), optimizer.zero_grad()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (256, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_path_of_a_gpu_a_skipped_step_changes_nothing(dtype, monkeypatch) -> None:
    monkeypatch.setattr(host_reads, "reads_are_free", lambda device: False)
    model = net(dtype)
    optimizer, run = OasisAdamW(model.parameters(), lr=0.05), compiled(model)
    train(model, optimizer, 2, run=run)
    run(batch(2, dtype)).square().mean().backward()
    model[0].weight.grad.factor[0, -1] = torch.inf  # in the tail alone
    subspace = model[0].weight.grad.subspace
    before = [tensor.detach().clone() for tensor in (model[0].weight, subspace.basis, subspace.tail)]
    optimizer.step()
    assert optimizer.num_skipped_steps == 1
    for old, now in zip(before, (model[0].weight, subspace.basis, subspace.tail), strict=True):
        assert torch.equal(old, now.detach())
