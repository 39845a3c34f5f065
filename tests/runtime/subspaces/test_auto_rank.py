"""Ranks that change during training: `rank=AutoRank(...)`, `resize_rank`, checkpoints of another rank."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import AutoRank, LowRankGrad, OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.optim import step as optimizer_step
from oasis_fx.runtime.subspaces.rules import Oja

from .narrow_and_wide import Net, loss_of, train


def start(rank, make=OasisAdamW, **settings):
    torch._dynamo.reset()
    model = Net().double()
    compiled = torch.compile(model, backend=oasis_backend(rank, inner="aot_eager", **settings))
    return model, compiled, make(model.parameters(), lr=1e-2)


def ranks(optimizer) -> list[int]:
    return [state["basis"].shape[1] for state in optimizer.state.values() if "basis" in state]


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    monkeypatch.setattr(optimizer_step, "RANK_STEPS", (3, 6))


def test_columns_move_to_where_energy_is_lost() -> None:
    model, compiled, optimizer = start(AutoRank(0.25))
    losses = train(compiled, optimizer, range(3))
    narrow, wide = ranks(optimizer)
    assert narrow == 8 and wide >= 24
    # 2 x 64 + 3 x 64 numbers a column of the one, 2 x 64 + 3 x 32 of the other.
    assert 320 * narrow + 224 * wide <= (320 + 224) * 16
    losses += train(compiled, optimizer, range(3, 12))
    assert ranks(optimizer) == [narrow, wide] and losses[-1] < losses[0]
    loss_of(compiled, 0).backward()
    assert model.narrow.weight.grad.factor.shape == (64, narrow)
    assert model.wide.weight.grad.factor.shape == (32, wide)


class Blocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Net() for _ in range(3))
        self.front, self.back = torch.nn.Linear(64, 64), torch.nn.Linear(32, 64)

    def forward(self, x):
        x = self.front(x)
        for block in self.blocks[:-1]:
            x = x + self.back(block(x))
        return self.blocks[-1](x)


def test_layers_that_share_a_compiled_graph_have_one_rank() -> None:
    """Compiled block by block, as large models are."""
    torch._dynamo.reset()
    model, backend = Blocks().double(), oasis_backend(AutoRank(0.25), inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=backend)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    losses = train(model, optimizer, range(12))
    of_blocks = ranks(optimizer)
    narrow, wide = of_blocks[::2], of_blocks[1::2]
    assert set(narrow) == {8} and len(wide) == 3 and len(set(wide)) == 1 and wide[0] >= 24
    assert losses[-1] < losses[0] and len(backend.compiled_graphs()) == 1


def test_a_checkpoint_of_other_ranks_in_layers_that_share_a_graph_is_refused() -> None:
    torch._dynamo.reset()
    model = Blocks().double()
    compiled = torch.compile(model, backend=oasis_backend(AutoRank(0.25), inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    train(compiled, optimizer, range(4))
    low = [optimizer.state[block.wide.weight]["basis"].shape[1] for block in model.blocks]
    assert len(set(low)) > 1, "every layer got one rank"
    torch._dynamo.reset()
    again, backend = Blocks().double(), oasis_backend(AutoRank(0.25), inner="aot_eager")
    for block in again.blocks:
        block.compile(backend=backend)
    other = OasisAdamW(again.parameters(), lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"layers that share the compiled graph of .* have different ranks"):
        train(again, other, range(1))
    torch._dynamo.reset()
    other.load_state_dict(other.resize_checkpoint(optimizer.state_dict(), 0.25))
    train(again, other, range(2))


def test_until_then_and_where_nothing_changes_it_is_the_even_rank() -> None:
    _, compiled, optimizer = start(AutoRank(0.25))
    _, even_compiled, even_optimizer = start(0.25)
    assert train(compiled, optimizer, range(2)) == train(even_compiled, even_optimizer, range(2))


def test_new_bases_are_orthonormal_and_means_are_kept(monkeypatch) -> None:
    _, compiled, optimizer = start(AutoRank(0.25))
    train(compiled, optimizer, range(2))
    seen = {}

    def look() -> None:
        for w, s in optimizer.state.items():
            if "basis" in s:
                seen[w] = s["exp_avg"] @ s["basis"].mT, s["basis"].clone()

    share_out = optimizer_step.share_ranks_out

    def watched(optimizer, plan, context):
        look()
        held = dict(seen)
        share_out(optimizer, plan, context)
        look()
        for w, (mean, basis) in held.items():
            after, new = seen[w]
            torch.testing.assert_close(new.mT @ new, torch.eye(new.shape[1], dtype=new.dtype))
            if new.shape[1] >= basis.shape[1]:
                torch.testing.assert_close(after, mean, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(new @ (new.mT @ basis), basis, rtol=1e-9, atol=1e-12)
            else:
                torch.testing.assert_close(after, mean @ new @ new.mT, rtol=1e-9, atol=1e-12)
                assert torch.linalg.vector_norm(after - mean) < 1e-6 * torch.linalg.vector_norm(mean)

    monkeypatch.setattr(optimizer_step, "share_ranks_out", watched)
    train(compiled, optimizer, range(2, 3))
    assert len(seen) == 2 and len(set(ranks(optimizer))) == 2


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_resumed_is_bitwise_the_uninterrupted_run(stop) -> None:
    model, compiled, optimizer = start(AutoRank(0.25))
    train(compiled, optimizer, range(stop))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(compiled, optimizer, range(stop, 10))
    model, compiled, optimizer = start(AutoRank(0.25))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(compiled, optimizer, range(stop, 10)) == expected


def test_resumed_into_a_model_that_has_begun() -> None:
    model, compiled, optimizer = start(AutoRank(0.25))
    train(compiled, optimizer, range(5))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(compiled, optimizer, range(5, 10))
    model, compiled, optimizer = start(AutoRank(0.25))
    train(compiled, optimizer, range(2))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(compiled, optimizer, range(5, 10)) == expected


def test_within_a_compiled_training_step() -> None:
    model, compiled, optimizer = start(AutoRank(0.25))
    expected = train(compiled, optimizer, range(8))
    model, _, optimizer = start(AutoRank(0.25))

    def step(number: int) -> torch.Tensor:
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = torch.compile(step, backend=oasis_backend(AutoRank(0.25), inner="aot_eager"))
    assert [run(number).item() for number in range(8)] == pytest.approx(expected, rel=1e-6)
    assert len(set(ranks(optimizer))) == 2


def test_accumulation_with_gradients_that_are_kept_as_zeros() -> None:
    _, compiled, optimizer = start(AutoRank(0.25))
    for step in range(8):
        loss_of(compiled, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert len(set(ranks(optimizer))) == 2


def test_without_statistics_of_energy_it_has_its_own() -> None:
    _, compiled, optimizer = start(AutoRank(0.25), stats=False)
    train(compiled, optimizer, range(4))
    assert len(set(ranks(optimizer))) == 2


@pytest.mark.parametrize("rank", ["auto", "auto:1", "auto:0", "auto:-0.2", "auto:2", "0.25", "auto:0.25x"])
def test_what_is_no_budget(rank) -> None:
    with pytest.raises(ValueError, match=f"rank is {rank!r}.*AutoRank"):
        oasis_backend(rank)


def test_rules_without_a_statistic_have_no_budget() -> None:
    with pytest.raises(ValueError, match="'pca' has none"):
        oasis_backend(AutoRank(0.25), subspace="pca")


MAKERS = [OasisAdamW, OasisSGD, OasisLion, OasisMuon]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("rank", [4, 24, 64, 0.5])
def test_resize_rank_between_steps(make, rank) -> None:
    model, compiled, optimizer = start(12, make)
    losses = train(compiled, optimizer, range(4))
    optimizer.resize_rank(rank)
    columns = rank if isinstance(rank, int) else 32
    assert ranks(optimizer) == [columns, columns]
    losses += train(compiled, optimizer, range(4, 12))
    assert losses[-1] < losses[0]
    loss_of(compiled, 0).backward()
    assert model.wide.weight.grad.factor.shape == (32, columns)


@pytest.mark.parametrize("rank", [4, 13, 64])
@pytest.mark.parametrize("seen", ["a statistic", "one that is not finite", "none"])
def test_bases_are_orthonormal_at_any_rank(rank, seen) -> None:
    """What ``narrow`` reads leaves its subspace in no direction, so that there is nothing to extend it by."""
    model, compiled, optimizer = start(12)
    train(compiled, optimizer, range(4))
    if seen != "none":
        loss_of(compiled, 4).backward()
        if seen == "one that is not finite":
            for subspace in optimizer.subspaces():
                subspace.statistic.fill_(torch.inf)
    optimizer.resize_rank(rank)
    for state in (optimizer.state[layer.weight] for layer in (model.narrow, model.wide)):
        basis = state["basis"]
        torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=basis.dtype), rtol=0, atol=1e-10)
    optimizer.zero_grad()
    train(compiled, optimizer, range(5, 7))


def test_states_of_full_size_stay_as_they_are() -> None:
    model, compiled, optimizer = start(12, lambda p, lr: OasisAdamW(p, lr, full_size_states=True))
    train(compiled, optimizer, range(3))
    before = optimizer.state[model.wide.weight]["exp_avg"].clone()
    optimizer.resize_rank(20)
    assert torch.equal(optimizer.state[model.wide.weight]["exp_avg"], before)
    losses = train(compiled, optimizer, range(3, 6))
    assert all(loss == loss for loss in losses)
    assert optimizer.state[model.wide.weight]["basis"].shape == (64, 20)


def test_a_larger_rank_keeps_the_mean_and_starts_new_second_moments_low() -> None:
    model, compiled, optimizer = start(12)
    train(compiled, optimizer, range(4))
    state = optimizer.state[model.wide.weight]
    mean = state["exp_avg"] @ state["basis"].mT
    optimizer.resize_rank(20)
    torch.testing.assert_close(state["exp_avg"] @ state["basis"].mT, mean, rtol=1e-9, atol=1e-12)
    least = state["exp_avg_sq"][:, :12].amin(dim=1, keepdim=True)
    assert torch.equal(state["exp_avg_sq"][:, 12:], least.expand(-1, 8)) and bool((least > 0).all())


def test_a_smaller_rank_keeps_what_is_large() -> None:
    model, compiled, optimizer = start(32)
    train(compiled, optimizer, range(4))
    state = optimizer.state[model.narrow.weight]
    mean = state["exp_avg"] @ state["basis"].mT  # of rank two: its activation has two directions
    optimizer.resize_rank(2)
    torch.testing.assert_close(state["exp_avg"] @ state["basis"].mT, mean, rtol=1e-6, atol=1e-9)


def test_eight_bit_states() -> None:
    class Big(Net):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = torch.nn.Linear(64, 256), torch.nn.Linear(64, 256)

        def forward(self, x):
            return (self.wide(x) + self.narrow(x))[:, :32]

    torch._dynamo.reset()
    model = Big()
    compiled = torch.compile(model, backend=oasis_backend(32, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-2, state_bits=8)
    for rank, dtype in ((32, torch.uint8), (48, torch.uint8), (8, torch.float32), (64, torch.uint8)):
        if rank != 32:
            optimizer.resize_rank(rank)
        for seed in range(2):
            x = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
            (compiled(x) - x[:, :32].sin()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = optimizer.state[model.wide.weight]
        assert state["exp_avg"].shape == (256, rank) and state["exp_avg"].dtype == dtype
        assert ("exp_avg_scale" in state) == (dtype == torch.uint8)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("rule", ["random", "dct", "principal_random"])
def test_bases_that_cannot_change_their_rank(rule, loaded) -> None:
    _, compiled, optimizer = start(8, subspace=rule)
    train(compiled, optimizer, range(2))
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=rule):
        optimizer.resize_rank(4)
    assert str(before) == str(optimizer.state_dict())


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "16"])
def test_ranks_that_are_none(rank) -> None:
    _, _, optimizer = start(8)
    with pytest.raises(ValueError, match=f"rank is {rank!r}"):
        optimizer.resize_rank(rank)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("rank", [4, 24])
def test_a_checkpoint_of_another_rank(rank, begun) -> None:
    model, compiled, optimizer = start(12)
    train(compiled, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    text = str(saved[1])
    optimizer.resize_rank(rank)
    expected = train(compiled, optimizer, range(4, 8))

    model, compiled, optimizer = start(rank)
    model.load_state_dict(saved[0])
    if begun:
        compiled(torch.zeros(96, 64, dtype=torch.float64)).sum().backward()
        optimizer.zero_grad()
        with pytest.raises(ValueError, match=f"resize_checkpoint\\(state_dict, {rank}\\)"):
            optimizer.load_state_dict(saved[1])
    optimizer.load_state_dict(optimizer.resize_checkpoint(saved[1], rank))
    assert str(saved[1]) == text
    assert train(compiled, optimizer, range(4, 8)) == expected


@pytest.mark.parametrize(("begun", "backend_rank"), [(False, 12), (True, 12), (False, 20)])
def test_resize_rank_right_after_loading(begun, backend_rank) -> None:
    model, compiled, optimizer = start(12, subspace=Oja(lr="auto"))
    train(compiled, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.resize_rank(20)
    expected = train(compiled, optimizer, range(4, 8))

    model, compiled, optimizer = start(backend_rank, subspace=Oja(lr="auto"))
    if begun:
        train(compiled, optimizer, range(1))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    optimizer.resize_rank(20)
    if backend_rank == 20:  # saved and loaded before any step
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(compiled, optimizer, range(4, 8)) == expected


def test_gradients_from_before_are_refused() -> None:
    model, compiled, optimizer = start(12)
    train(compiled, optimizer, range(2))
    loss_of(compiled, 2).backward()
    assert isinstance(model.wide.weight.grad, LowRankGrad)
    optimizer.resize_rank(4)
    with pytest.raises(ValueError, match="its rank has changed"):
        optimizer.step()
