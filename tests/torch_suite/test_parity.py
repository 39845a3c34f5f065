"""OasisAdamW and OasisSGD on dense parameters are torch.optim.AdamW and SGD, over what torch tries those with.

Settings come from torch's own database of optimizers; what a peer has and we do not (``amsgrad``, ``maximize``, ...) is
refused by Python itself. Weight decay of OasisSGD is decoupled, so that it is compared without.
"""

from __future__ import annotations

import inspect

import pytest
import torch

from .four import FOUR, PEERS, copies, give_gradients, info_of, parameters

pytestmark = pytest.mark.slow

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


OURS = {
    "far from the defaults": {"lr": 0.3, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.4},
    "tensor lr": {"lr": torch.tensor(0.02, dtype=torch.float64)},  # torch computes in its dtype
    "tensor betas": {"betas": (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))},
}


def inputs(name: str, dtype: torch.dtype) -> dict[str, dict]:
    """The settings that torch tries a peer with on a CPU, by what they are called, and some of ours besides."""
    given = info_of(PEERS[name]).optim_inputs_func(device="cpu", dtype=dtype)
    return {one.desc: dict(one.kwargs) for one in given} | (OURS if name == "OasisAdamW" else {})


def peers(name: str, settings: dict, params, others):
    """Ours, without what ours alone has, and torch's."""
    defaults = {"stochastic_rounding": False}
    if name == "OasisSGD":  # whose defaults of ours are others
        settings = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0} | settings
    return FOUR[name](params, **settings, **defaults), PEERS[name](others, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PEERS)
def test_settings_of_torch_s_database(name, dtype) -> None:
    taken, compared = set(inspect.signature(FOUR[name]).parameters), 0
    for called, settings in inputs(name, dtype).items():
        params = parameters(dtype)
        unknown = set(settings) - taken
        if unknown:
            named = "|".join(unknown)
            with pytest.raises((TypeError, ValueError), match=f"unexpected keyword argument '({named})'|({named}) is "):
                FOUR[name](params, **settings)
            continue
        if name == "OasisSGD":
            settings = {**settings, "weight_decay": 0.0}
        others = copies(params)
        ours, theirs = peers(name, settings, params, others)
        for step in range(6):
            give_gradients(params, step), give_gradients(others, step)
            ours.step(), theirs.step()
            for one, other in zip(params, others, strict=True):
                tolerance = TOLERANCE[dtype]
                torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, c=called: c + m)
        compared += 1
    assert compared == {"OasisAdamW": 6, "OasisSGD": 7}[name]


def strided(kind: str, shape: tuple[int, ...] = (4, 6)) -> torch.Tensor:
    """A tensor of that shape whose memory is laid out in another way than torch would."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if kind == "transposed":
        return values.T.contiguous().T
    if kind == "every other column":
        return torch.randn(shape[0], 2 * shape[1], dtype=torch.float64)[:, ::2].copy_(values)
    if kind == "channels last":
        return values.view(2, 2, 3, 2).contiguous(memory_format=torch.channels_last)
    assert kind == "contiguous"
    return values


KINDS = ["contiguous", "transposed", "every other column", "channels last"]


@pytest.mark.parametrize("of_gradient", ["contiguous", "as the weight", "transposed"])
@pytest.mark.parametrize("of_weight", KINDS)
@pytest.mark.parametrize("name", PEERS)
def test_layouts_of_weights_and_gradients(name, of_weight, of_gradient) -> None:
    weight = torch.nn.Parameter(strided(of_weight))
    other = torch.nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    around = weight.detach().as_strided((weight.untyped_storage().nbytes() // 8,), (1,), 0).clone()
    settings = {"OasisAdamW": {"lr": 0.1}, "OasisSGD": {"lr": 0.1, "momentum": 0.9}}[name]
    ours, theirs = peers(name, settings, [weight], [other])
    for step in range(4):
        give_gradients([other], step)
        gradient = other.grad.clone()
        if of_gradient == "as the weight":
            gradient = torch.empty_like(weight).copy_(gradient)
        elif of_gradient == "transposed":
            gradient = gradient.transpose(0, -1).contiguous().transpose(0, -1)
        weight.grad = gradient
        ours.step(), theirs.step()
        torch.testing.assert_close(weight, other, rtol=1e-12, atol=1e-12)
    if of_weight == "every other column":  # what lies between is not ours
        after = weight.detach().as_strided((weight.untyped_storage().nbytes() // 8,), (1,), 0)
        assert torch.equal(after[1::2], around[1::2])


@pytest.mark.parametrize("name", PEERS)
def test_scalars_and_empty_parameters(name) -> None:
    params = [torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.zeros(0, 3)), *parameters()]
    others = copies(params)
    ours, theirs = peers(name, {"lr": 0.1}, params, others)
    for step in range(3):
        give_gradients(params, step), give_gradients(others, step)
        ours.step(), theirs.step()
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", PEERS)
def test_gradients_that_come_and_go(name) -> None:
    """A parameter whose gradient is None keeps its step count; torch's does too."""
    params = parameters(torch.float64)
    others = copies(params)
    ours, theirs = peers(name, {"lr": 0.1, **({"momentum": 0.9} if name == "OasisSGD" else {})}, params, others)
    for step in range(7):
        give_gradients(params, step), give_gradients(others, step)
        absent = step % 3
        params[absent].grad = others[absent].grad = None
        ours.step(), theirs.step()
        for one, other in zip(params, others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_groups_with_settings_of_their_own_and_one_that_comes_later(name) -> None:
    params = parameters(torch.float64)
    others = copies(params)
    made = []
    for cls, given in ((FOUR[name], params), (PEERS[name], others)):
        groups = [{"params": [given[0]], "lr": 0.2}, {"params": [given[1]]}]
        settings = {"lr": 0.05, "weight_decay": 0.0, **({"momentum": 0.5} if name == "OasisSGD" else {})}
        made.append(cls(groups, **settings))
    for step in range(6):
        if step == 3:
            for optimizer, given in zip(made, (params, others), strict=True):
                optimizer.add_param_group({"params": [given[2]], "lr": 0.3})
        give_gradients(params, step), give_gradients(others, step)
        for optimizer in made:
            optimizer.step()
            optimizer.param_groups[1]["lr"] *= 0.9
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize("name", PEERS)
def test_schedules_of_torch_s_database(name, schedule) -> None:
    made = [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12, cycle_momentum=False),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, gamma=0.5, step_size=3),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    ][schedule]
    params = parameters(torch.float64)
    others = copies(params)
    both = peers(name, {"lr": 0.1, "weight_decay": 0.0}, params, others)
    schedules = [made(optimizer) for optimizer in both]
    rates = []
    for step in range(12):
        give_gradients(params, step), give_gradients(others, step)
        for optimizer, scheduler in zip(both, schedules, strict=True):
            optimizer.step()
            scheduler.step(*([1.0] if schedule == 2 else []))
        rates.append(both[0].param_groups[0]["lr"])
        assert rates[-1] == both[1].param_groups[0]["lr"]
    assert len(set(rates)) > 1
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_sgd_decays_weights_beside_the_gradient_and_not_within() -> None:
    """The one setting in which OasisSGD is not torch's: SGDW."""
    params = parameters(torch.float64)
    others = copies(params)
    ours, theirs = peers("OasisSGD", {"lr": 0.1, "momentum": 0.9}, params, others)
    ours.param_groups[0]["weight_decay"] = 0.3
    for step in range(4):
        give_gradients(params, step), give_gradients(others, step)
        with torch.no_grad():
            for other in others:
                other.mul_(1 - 0.1 * 0.3)
        ours.step(), theirs.step()
    for one, other in zip(params, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_a_state_dict_of_ours_has_the_moments_of_torch_s(name) -> None:
    params = parameters(torch.float64)
    others = copies(params)
    ours, theirs = peers(name, {"lr": 0.1, **({"momentum": 0.9} if name == "OasisSGD" else {})}, params, others)
    for step in range(3):
        give_gradients(params, step), give_gradients(others, step)
        ours.step(), theirs.step()
    found, expected = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert found.keys() == expected.keys() and len(found) == 3
    for key, entry in expected.items():
        for kind, value in entry.items():
            torch.testing.assert_close(found[key][kind], value, rtol=1e-12, atol=1e-12)
