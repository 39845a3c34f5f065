"""Checkpoints: bitwise resume, plain contents, and refusals that load nothing."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from oasis_fx.runtime.optim.adamw import OasisAdamW
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

SPEC = SubspaceSpec(3)


def build(make_weight, dtype=torch.float32):
    weights = [make_weight(5, 8, seed=1, dtype=dtype), make_weight(6, 8, seed=2, dtype=dtype)]
    bias = torch.nn.Parameter(torch.zeros(5, dtype=dtype))
    named = [("q.weight", weights[0]), ("k.weight", weights[1]), ("q.bias", bias)]
    return weights, bias, OasisAdamW(named, lr=0.05)


def train(products, weights, bias, optimizer, steps) -> None:
    for step in steps:
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(step)).to(weights[0].dtype)
        q, k = products(x, weights, SPEC)
        ((q + bias).square().mean() + k.sin().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("when", ["before the first forward", "after some steps"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(when, dtype, products, make_weight) -> None:
    weights, bias, optimizer = build(make_weight, dtype)
    train(products, weights, bias, optimizer, range(3))
    saved = through_a_file(
        {"optimizer": optimizer.state_dict(), "model": [p.detach().clone() for p in (*weights, bias)]}
    )
    train(products, weights, bias, optimizer, range(3, 6))

    again, again_bias, resumed = build(make_weight, dtype)
    if when == "after some steps":
        train(products, again, again_bias, resumed, range(50, 52))
    with torch.no_grad():
        for p, value in zip((*again, again_bias), saved["model"], strict=True):
            p.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    train(products, again, again_bias, resumed, range(3, 6))

    for p, q in zip((*weights, bias), (*again, again_bias), strict=True):
        assert torch.equal(p, q)
    for p, q in zip(weights, again, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "basis", "step"):
            assert torch.equal(optimizer.state[p][key], resumed.state[q][key]), key
            assert optimizer.state[p][key].dtype == resumed.state[q][key].dtype
    assert STORE.existing(again[0], SPEC) is STORE.existing(again[1], SPEC)  # still shared


def test_two_checkpoints_that_wait_do_not_share_their_bases(products, make_weight) -> None:
    """The bases of each are numbered from 0. Weights of two models that were loaded before any forward pass."""
    saved = []
    for seed in (1, 2):
        weights, bias, optimizer = build(make_weight)
        train(products, weights, bias, optimizer, range(10 * seed, 10 * seed + 2))
        saved.append(through_a_file(optimizer.state_dict()))
    runs = [build(make_weight) for _ in saved]
    for (_, _, optimizer), state in zip(runs, saved, strict=True):
        optimizer.load_state_dict(state)
    for weights, _, _ in runs:
        products(torch.randn(20, 8), weights, SPEC)
    first, second = (STORE.existing(weights[0], SPEC) for weights, _, _ in runs)
    assert first is not second
    for subspace, state in zip((first, second), saved, strict=True):
        assert torch.equal(subspace.basis, state["state"][0]["basis"])


def test_contents_are_plain_and_bases_are_numbered(products, make_weight) -> None:
    weights, bias, optimizer = build(make_weight)
    lone = make_weight(4, 8, seed=9, dtype=torch.float32)
    optimizer.add_param_group({"params": [("o.weight", lone)]})
    train(products, weights, bias, optimizer, range(2))
    (y,) = products(torch.randn(20, 8), [lone], SPEC)
    y.sum().backward()
    optimizer.step()
    state = through_a_file(optimizer.state_dict())["state"]
    assert state[0]["subspace"] == state[1]["subspace"] != state[3]["subspace"]
    assert set(state[0]) == {
        "step",
        "exp_avg",
        "exp_avg_sq",
        "basis",
        "basis_updates",
        "basis_steps",
        "features",
        "subspace",
    }
    assert set(state[2]) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(state[0]["basis"], STORE.existing(weights[0], SPEC).basis)


def test_saving_changes_nothing(products, make_weight) -> None:
    weights, bias, optimizer = build(make_weight)
    other, other_bias, silent = build(make_weight)
    for step in range(4):
        train(products, weights, bias, optimizer, [step])
        train(products, other, other_bias, silent, [step])
        optimizer.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(weights, other, strict=True))


def test_a_deep_copied_optimizer_goes_on_by_itself(products, make_weight) -> None:
    weights, bias, optimizer = build(make_weight)
    train(products, weights, bias, optimizer, range(2))
    model = copy.deepcopy({"weights": weights, "bias": bias, "optimizer": optimizer})
    copied = [p for group in model["optimizer"].param_groups for p in group["params"]]
    assert copied[0] is model["weights"][0]
    train(products, model["weights"], model["bias"], model["optimizer"], range(2, 4))
    assert all(p.isfinite().all() for p in copied)
    train(products, weights, bias, optimizer, range(2, 4))
    assert not any(p is q for p, q in zip(copied, weights, strict=False))


def changed(state: dict, key: int, **entries) -> dict:
    state = copy.deepcopy(state)
    state["state"][key].update(entries)
    return state


def test_what_does_not_fit_is_refused_and_nothing_is_loaded(products, make_weight) -> None:
    weights, bias, optimizer = build(make_weight)
    train(products, weights, bias, optimizer, range(2))
    good = optimizer.state_dict()
    fresh, fresh_bias, target = build(make_weight)
    train(products, fresh, fresh_bias, target, range(60, 61))
    before = copy.deepcopy(target.state_dict())
    basis = STORE.existing(fresh[0], SPEC).basis.detach().clone()

    wrong = {
        r"k\.weight trains with a basis of shape \(8, 3\), the saved one has shape \(8, 2\).*rank=2": changed(
            good, 1, basis=torch.zeros(8, 2), exp_avg=torch.zeros(6, 2), exp_avg_sq=torch.zeros(6, 2)
        ),
        r"k\.weight has shape \(6, 8\), its saved basis \(9, 3\)": changed(good, 1, basis=torch.zeros(9, 3)),
        r"k\.weight has shape \(6, 8\), .* moments \(7, 3\): \(8, 3\) and \(6, 3\) would fit": changed(
            good, 1, exp_avg=torch.zeros(7, 3)
        ),
        r"k\.weight .* moments \(6, 4\)": changed(good, 1, exp_avg=torch.zeros(6, 4)),
        r"q\.bias has shape \(5,\), its saved moments \(4,\)": changed(good, 2, exp_avg=torch.zeros(4)),
    }
    for message, state in wrong.items():
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(state)
        after = target.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, entry in before["state"].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][key][k])) for k, v in entry.items()
            )
        assert torch.equal(STORE.existing(fresh[0], SPEC).basis, basis)


def test_another_rank_before_the_first_forward_is_refused_at_the_first_step(products, make_weight) -> None:
    weights, bias, optimizer = build(make_weight)
    train(products, weights, bias, optimizer, range(2))
    fresh, fresh_bias, target = build(make_weight)
    target.load_state_dict(optimizer.state_dict())  # nothing is known yet of the rank that the model will train with
    q, k = products(torch.randn(20, 8), fresh, SubspaceSpec(2))
    (q.sum() + k.sum() + fresh_bias.sum()).backward()
    before = fresh[0].detach().clone()
    with pytest.raises(ValueError, match=r"q\.weight has moments of shape \(5, 3\) and a gradient of shape \(5, 2\)"):
        target.step()
    assert torch.equal(fresh[0], before)
