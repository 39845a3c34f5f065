"""Whole training loops through the backend and the optimizer, as users write them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, LowRankGradWarning, OasisAdamW, oasis_backend

INNER = ["aot_eager", "inductor"]


class Block(torch.nn.Module):
    def __init__(self, n: int = 32, m: int = 48) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(n)
        self.up, self.gate = torch.nn.Linear(n, m), torch.nn.Linear(n, m, bias=False)
        self.down = torch.nn.Linear(m, n)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def net(dtype=torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(), Block(), torch.nn.Linear(32, 5)).to(dtype)


def batch(step: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that vary in six directions and a little in all, as activations do; labels from those directions."""
    generator, fixed = torch.Generator().manual_seed(step), torch.Generator().manual_seed(1)
    latent = torch.randn(64, 6, generator=generator)
    x = latent @ torch.randn(6, 32, generator=fixed) + 0.1 * torch.randn(64, 32, generator=generator)
    return x.to(dtype), (latent @ torch.randn(6, 5, generator=fixed)).argmax(-1)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("autocast", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "autocast"])
def test_training_learns_and_stays_low_rank(inner, dtype, autocast) -> None:
    model = net(dtype)
    compiled = torch.compile(model, backend=oasis_backend(rank=8, inner=inner))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", LowRankGradWarning)
        for step in range(40):
            for part in range(2):  # gradient accumulation
                x, y = batch(2 * step + part, dtype)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(compiled(x), y) / 2
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(2 * loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    bases = {s["basis"].data_ptr(): s["basis"] for s in optimizer.state.values() if "basis" in s}
    assert len(bases) == 5  # two a block, one for the last layer
    for q in bases.values():
        assert (q.T.double() @ q.double() - torch.eye(q.shape[1])).abs().max() < 1e-5
        assert q.dtype == torch.float32
    for state in optimizer.state.values():
        assert state["exp_avg"].isfinite().all() and (state["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bfloat16_factors_are_the_dense_gradients_projected(inner, autocast) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model, (x, y) = net(dtype), batch(0, dtype)
    reference = copy.deepcopy(model)
    outputs = []
    for module, backend in ((reference, inner), (model, oasis_backend(rank=8, inner=inner))):
        torch._dynamo.reset()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outputs.append(torch.compile(module, backend=backend)(x))
        F.cross_entropy(outputs[-1].float(), y).backward()
    assert torch.equal(*outputs)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        if p.dim() == 1:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)
            continue
        assert isinstance(p.grad, LowRankGrad) and p.grad.factor.dtype == dtype
        projected = q.grad.float() @ p.grad.basis.detach()
        assert (p.grad.factor.float() - projected).norm() < 3e-2 * projected.norm()


def test_a_second_backward_through_a_retained_graph() -> None:
    model, (x, y) = net(), batch(0)
    with torch._functorch.config.patch(donated_buffer=False):  # as stock torch.compile asks for
        loss = F.cross_entropy(torch.compile(model, backend=oasis_backend(rank=8, inner="aot_eager"))(x), y)
        loss.backward(retain_graph=True)
        once = model[0].up.weight.grad.factor.clone()
        loss.backward()
    torch.testing.assert_close(model[0].up.weight.grad.factor, 2 * once)


def test_what_a_graph_keeps_of_its_own_may_be_donated_to_a_backward_pass() -> None:
    """Torch refuses to retain such a graph, and names its setting, with which it is right."""
    model, x = torch.nn.Linear(6, 4, bias=False), torch.randn(2, 6)
    for donates in (True, False):
        torch._dynamo.reset()
        backend = oasis_backend(rank=3, subspace="dct", inner="aot_eager")
        with torch._functorch.config.patch(donated_buffer=donates):
            loss = torch.compile(model, backend=backend, dynamic=True)(x).sin().sum()
            if donates:
                with pytest.raises(RuntimeError, match="donated_buffer=False"):
                    loss.backward(retain_graph=True)
                continue
            loss.backward(retain_graph=True)
            once = model.weight.grad.factor.clone()
            loss.backward()
            torch.testing.assert_close(model.weight.grad.factor, 2 * once)


def test_an_eager_pass_in_the_middle_of_an_accumulation_adds_exactly() -> None:
    """As when Dynamo's recompile limit falls back to eager."""
    model, reference = net(), net()
    compiled = torch.compile(model, backend=oasis_backend(rank=8, inner="aot_eager"))
    (x1, y1), (x2, y2) = batch(0), batch(1)
    F.cross_entropy(compiled(x1), y1).backward()
    weight = model[0].up.weight
    low_rank = weight.grad.to_dense().clone()
    with pytest.warns(LowRankGradWarning, match="turned dense") as _:
        from oasis_fx.runtime.gradients import at_full_size

        at_full_size._warned.clear()
        F.cross_entropy(model(x2), y2).backward()
    F.cross_entropy(reference(x2), y2).backward()
    torch.testing.assert_close(weight.grad.to_dense(), low_rank + reference[0].up.weight.grad)
    OasisAdamW(model.parameters()).step()  # takes it as the dense gradient that it is


def test_an_optimizer_step_between_forward_and_backward_is_refused() -> None:
    model, (x, y) = net(), batch(0)
    compiled = torch.compile(model, backend=oasis_backend(rank=8, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    F.cross_entropy(compiled(x), y).backward()
    late = F.cross_entropy(compiled(x), y)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"basis moved between|modified by an inplace operation"):
        late.backward()


def test_a_run_resumed_in_a_new_model_is_bitwise_the_same(tmp_path) -> None:
    def train(model, optimizer, steps):
        compiled = torch.compile(model, backend=oasis_backend(rank=8, inner="aot_eager"))
        for step in steps:
            x, y = batch(step)
            F.cross_entropy(compiled(x), y).backward()
            optimizer.step(), optimizer.zero_grad()

    model = net()
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, range(4, 8))
    torch._dynamo.reset()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = net()
    resumed = OasisAdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    train(again, resumed, range(4, 8))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_loading_a_checkpoint_of_another_rank_names_both_shapes() -> None:
    model = net()
    named = OasisAdamW(model.named_parameters(), lr=1e-2)
    x, y = batch(0)
    F.cross_entropy(torch.compile(model, backend=oasis_backend(rank=8, inner="aot_eager"))(x), y).backward()
    named.step()
    other = net()
    target = OasisAdamW(other.named_parameters(), lr=1e-2)
    F.cross_entropy(torch.compile(other, backend=oasis_backend(rank=4, inner="aot_eager"))(x), y).backward()
    with pytest.raises(
        ValueError, match=r"0\.up\.weight trains with a basis of shape \(32, 4\), the saved one has shape \(32, 8\)"
    ):
        target.load_state_dict(named.state_dict())
