"""What every rule has to keep to, whatever its equations."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend
from oasis_fx.runtime.optim.items import find_items
from oasis_fx.runtime.optim.preparation import prepare_state
from oasis_fx.runtime.subspaces.rules import DCT, GradientPower, Rule, rule_of
from tests.rules import moving_every

from .two_weights import Net, batch, loss_of

RANK, LR = 4, 0.02


ALL = ["oja", "pca", "random", "principal_random", "sampled", "gradient_svd", "gradient_oja", "gradient_power", "dct",
       DCT("gradient"), GradientPower(error_feedback=True)]  # fmt: skip


def name_of(rule: str | Rule) -> str:
    return rule if isinstance(rule, str) else str(rule)


def num_low_rank(model) -> int:
    return sum(isinstance(p.grad, LowRankGrad) for p in model.parameters())


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_at_full_rank_every_rule_has_the_dense_gradient(rule) -> None:
    torch._dynamo.reset()
    model, plain = Net(), Net()
    backend = oasis_backend(64, subspace=rule, inner="aot_eager")
    loss_of(torch.compile(model, backend=backend), 0).backward()
    loss_of(plain, 0).backward()
    assert num_low_rank(model) == (0 if rule == "sampled" else 2)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = found.grad
        if isinstance(gradient, LowRankGrad):
            if not gradient.subspace.spec.rule.orthonormal:  # Q Q^T is not I, but Q is invertible
                q = gradient.basis
                torch.testing.assert_close(gradient.factor @ torch.linalg.inv(q), expected.grad, rtol=1e-6, atol=1e-8)
                torch.testing.assert_close(gradient.norm(), gradient.to_dense().norm())
                continue
            torch.testing.assert_close(gradient.norm(), expected.grad.norm())
            gradient = gradient.to_dense()
        torch.testing.assert_close(gradient, expected.grad)


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_micro_batches_add_up_in_one_basis(rule) -> None:
    """Two backward passes before a step: the gradient is the sum of both in the basis of the first."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    model, plain = Net(), Net()
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule, inner="aot_eager"))
    for part in range(2):
        loss_of(compiled, part).backward()
        loss_of(plain, part).backward()
    assert num_low_rank(model) == (0 if rule == "sampled" else 2)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = found.grad
        if not isinstance(gradient, LowRankGrad):
            continue
        subspace = gradient.subspace
        q = gradient.basis.detach()
        weights = getattr(subspace.spec.rule, "weights", lambda *_: None)(*subspace.shape)
        projection = q if weights is None else q * weights.double()
        dense = expected.grad if gradient.features == (1, 2) else expected.grad.T
        torch.testing.assert_close(gradient.factor, dense @ projection)
        assert int(subspace.num_updates) == (0 if name_of(rule) in ("oja", "gradient_oja", "random") else 1)


@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_a_default_device_of_the_user_s_is_not_ours(rule) -> None:
    """Under `torch.set_default_device("cuda")` what we make on the CPU must stay there; meta stands in for it."""
    torch._dynamo.reset()
    model = Net()
    backend = oasis_backend(
        RANK, subspace=rule_of(rule, lr="auto") if name_of(rule).endswith("oja") else rule, inner="aot_eager"
    )
    compiled = torch.compile(model, backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=LR)
    batches = [batch(step) for step in range(3)]
    with torch.device("meta"):
        for x, y in batches:
            (compiled(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("saved_after", [3, 4])
@pytest.mark.parametrize("rule", ALL, ids=name_of)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(rule, saved_after, tmp_path) -> None:
    """Saved where the basis' turn comes right after, and in the midst of a period."""

    def start(seed: int):
        torch._dynamo.reset()
        model = Net()
        torch.manual_seed(seed)
        compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=moving_every(rule, 3), inner="aot_eager"))
        return model, compiled, OasisAdamW(model.parameters(), lr=LR)

    def run(compiled, optimizer, steps) -> None:
        for step in steps:
            loss_of(compiled, step).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, compiled, optimizer = start(1)
    run(compiled, optimizer, range(saved_after))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(saved, tmp_path / "state.pt")
    run(compiled, optimizer, range(saved_after, 9))
    again, compiled, optimizer = start(2)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    run(compiled, optimizer, range(saved_after, 9))
    for found, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


BY_THE_BATCH = ["pca", "principal_random", "dct", "gradient_svd", "gradient_power", GradientPower(error_feedback=True)]


@pytest.mark.parametrize("spoilt", [0.0, float("nan")])
@pytest.mark.parametrize("rule", BY_THE_BATCH, ids=name_of)
def test_a_step_stays_in_one_basis_though_its_first_batch_says_nothing(rule, spoilt) -> None:
    """A zero batch, as of an expert that nothing is routed to, then a good one; a NaN leaves nothing behind."""
    torch._dynamo.reset()
    model, plain = Net(), Net()
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=moving_every(rule, 1), inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=LR)
    (compiled(batch(0)[0] * spoilt) * spoilt).sum().backward()
    loss_of(compiled, 1).backward()
    loss_of(plain, 1).backward()
    gradient = model.up.weight.grad
    if spoilt == 0.0:
        q, rule_of_it = gradient.basis.detach(), gradient.subspace.spec.rule
        weights = rule_of_it.weights(*q.shape)
        projection = q if weights is None else q * weights.double()
        dense = plain.up.weight.grad if gradient.features == (1, 2) else plain.up.weight.grad.T
        torch.testing.assert_close(gradient.factor, dense @ projection)
        optimizer.step()
    else:
        with pytest.warns(RuntimeWarning, match="not finite"):
            optimizer.step()
    optimizer.zero_grad()
    before = int(gradient.subspace.num_updates)
    for step in range(2, 5):
        loss_of(compiled, step).backward()
        assert bool(model.up.weight.grad.factor.isfinite().all())
        optimizer.step()
        optimizer.zero_grad()
    assert int(gradient.subspace.num_updates) == before + 3  # its turn came again
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("rules", [("dct", "pca"), ("pca", "dct"), ("random", "oja")])
def test_moments_go_over_from_one_rule_to_another_and_so_does_the_checkpoint(rules, tmp_path) -> None:
    torch._dynamo.reset()
    model = Net()
    optimizer = OasisAdamW(model.parameters(), lr=LR)
    for number, rule in enumerate(rules):
        compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule, inner="aot_eager"))
        loss_of(compiled, number).backward()
        weight = model.up.weight
        if number == 1:
            old, mean = optimizer.bindings[weight].subspace.basis.detach(), optimizer.state[weight]["exp_avg"].clone()
            prepare_state(optimizer, next(iter(find_items(optimizer))))
            found = optimizer.state[weight]["exp_avg"]
            torch.testing.assert_close(found, mean @ (old.mT @ weight.grad.basis.detach()))
        optimizer.step()
        optimizer.zero_grad()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = Net()
    again = OasisAdamW(fresh.parameters(), lr=LR)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch._dynamo.reset()
    loss_of(torch.compile(fresh, backend=oasis_backend(RANK, subspace=rules[1], inner="aot_eager")), 2).backward()
    again.step()
    assert bool(fresh.up.weight.isfinite().all())


def test_error_feedback_refuses_a_scaled_loss() -> None:
    torch._dynamo.reset()
    model = Net().float()
    rule = GradientPower(error_feedback=True)
    compiled = torch.compile(model, backend=oasis_backend(RANK, subspace=rule, inner="aot_eager"))
    optimizer, scaler = OasisAdamW(model.parameters(), lr=LR), torch.amp.GradScaler("cpu")
    x, y = (t.float() for t in batch(0))
    scaler.scale((compiled(x) - y).square().mean()).backward()
    with pytest.raises(RuntimeError, match=r"error feedback of .* does not go with a scaled loss"):
        scaler.step(optimizer)
