"""What torch's tests of optimizers ask of every optimizer: arguments, hooks, closures, copies, printing."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .four import FOUR, PEERS, assert_equal_states, copies, database, every, give_gradients, info_of, parameters, steps

pytestmark = pytest.mark.slow


def named_in(message: str) -> str:
    """Our messages are worded otherwise than torch's; they name the same setting."""
    return {"Tensor lr must be 1-element": "lr is tensor"}.get(message, message)


@every
def test_errors_of_all_optimizers(make) -> None:
    """A single tensor, parameters given twice, a learning rate of two elements, names for some parameters alone."""
    module, raised = database(), 0
    for error in module.get_error_inputs_for_all_optims("cpu", torch.float32):
        given = error.optimizer_error_input
        params = parameters() if given.params is None else given.params
        assert error.error_on is module.OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=error.error_regex):
                make(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=named_in(error.error_regex)):
                make(params, **given.kwargs)
        raised += 1
    assert raised >= 6


@pytest.mark.parametrize("peer", PEERS)
def test_errors_of_the_peers(peer) -> None:
    """Of those of torch.optim.AdamW and SGD: refused where we have the setting, or as good as plain numbers."""
    make, refused = FOUR[peer], 0
    common = {error.optimizer_error_input.desc for error in database().get_error_inputs_for_all_optims("cpu", None)}
    for error in info_of(PEERS[peer]).optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        if given.desc in common:
            continue
        if "foreach" in given.kwargs:
            with pytest.raises((TypeError, ValueError), match=r"unexpected keyword argument 'foreach'|foreach is "):
                make(parameters(), **given.kwargs)
        elif any(isinstance(beta, torch.Tensor) for beta in given.kwargs.get("betas", ())):
            # A tensor beside a number: torch refuses them, to us they are two numbers.
            params, others = parameters(), parameters()
            numbers = tuple(map(float, given.kwargs["betas"]))
            steps(make(params, **given.kwargs), params, range(2))
            steps(make(others, **{**given.kwargs, "betas": numbers}), others, range(2))
            assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))
        else:
            (name,) = {"betas", "weight_decay", "momentum"} & set(given.kwargs)
            with pytest.raises(error.error_type, match=f"{name} is "):
                make(parameters(), **given.kwargs)
            refused += 1
    assert refused == {"OasisAdamW": 2, "OasisSGD": 1}[peer]


@every
def test_sparse_gradients_are_refused(make) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 2))
    before = weight.detach().clone()
    weight.grad = torch.sparse_coo_tensor([[0, 2]], torch.ones(2, 2), (4, 2))
    with pytest.raises(RuntimeError, match=r"does not support sparse gradients"):
        make([weight]).step()
    assert torch.equal(weight, before)


@every
def test_a_step_without_gradients_is_none(make) -> None:
    params = parameters()
    before = copies(params)
    optimizer = make(params)
    optimizer.step()
    assert not optimizer.state and all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    give_gradients(params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    give_gradients(params)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in params)


@every
def test_gradients_of_zero_move_nothing(make) -> None:
    params = parameters()
    before = copies(params)
    optimizer = make(params, weight_decay=0.0)
    for _ in range(3):
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert all(float(optimizer.state[p]["step"]) == 3 for p in params)


@pytest.mark.parametrize("with_schedule", [False, True])
@every
def test_the_loop_goes_in_the_right_direction(make, with_schedule) -> None:
    """torch's test of that name: a matrix, a bias and a target."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in ((10, 5), (10,)))
    x, target = torch.randn(5, generator=generator), torch.randn(10, generator=generator)
    optimizer = make([weight, bias], lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9) if with_schedule else None

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias - target).square().sum()
        loss.backward()
        return loss

    first = float(closure().detach())
    for _ in range(20):
        closure()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    assert float(closure().detach()) < 0.9 * first


@every
def test_a_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(make) -> None:
    params, calls = parameters(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    optimizer = make(params)
    before = copies(params)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    torch.testing.assert_close(loss.detach(), sum(p.detach().square().sum() for p in before))
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert optimizer.step() is None


@every
def test_hooks_of_a_step_in_their_order(make) -> None:
    params, seen = parameters(), []
    optimizer = make(params)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("every pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("every post")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        for _ in range(2):
            give_gradients(params)
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["every pre", "pre", "post", "every post"] * 2
    optimizer.step()
    assert len(seen) == 8


@every
def test_a_pre_hook_may_change_gradients_and_arguments(make) -> None:
    params = parameters()
    others = copies(params)
    optimizer, plain = make(params), make(others)

    def closure():
        return torch.tensor(7.0)

    def halve(this, args, kwargs):
        for group in this.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        return (this, closure), kwargs

    optimizer.register_step_pre_hook(halve)
    give_gradients(params), give_gradients(others)
    for other in others:
        other.grad.mul_(0.5)
    assert float(optimizer.step()) == 7.0
    plain.step()
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))


@every
def test_it_can_be_printed(make) -> None:
    text = repr(make([{"params": [p], "lr": 0.1 * i} for i, p in enumerate(parameters())]))
    assert text.startswith(make.__name__) and text.count("Parameter Group") == 3 and "lr: 0.2" in text


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))], ids=["copy", "pickle"]
)
@every
def test_a_copy_with_its_parameters_goes_on_alike_and_apart(make, copied) -> None:
    params = parameters()
    optimizer = make(params)
    steps(optimizer, params, range(2))
    others, twin = copied((params, optimizer))
    assert all(a is b for a, b in zip(others, (p for g in twin.param_groups for p in g["params"]), strict=True))
    before = [p.detach().clone() for p in params]
    steps(twin, others, range(2, 5))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))  # the original is left alone
    steps(optimizer, params, range(2, 5))
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))
    assert_equal_states(twin.state_dict(), optimizer.state_dict())


@every
def test_a_deep_copy_has_all_public_attributes(make) -> None:
    optimizer = make(parameters())
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert public == {name for name in vars(copy.deepcopy(optimizer)) if not name.startswith("_")}


@every
def test_no_warning_in_an_ordinary_loop(make) -> None:
    """Dense parameters, as of a model of which every weight was left alone: nothing to warn of in a loop like this."""
    params = parameters()
    optimizer = make(params, lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=DeprecationWarning)
        warnings.filterwarnings("error", message=".*lr_scheduler.*")
        for step in range(3):
            give_gradients(params, step)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            schedule.step()


@every
def test_parameters_that_need_no_gradients_and_generators_of_parameters(make) -> None:
    params = [p.requires_grad_(False) for p in parameters()]
    before = copies(params)
    optimizer = make(p for p in params)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    params[0].requires_grad_()
    give_gradients(params[:1])
    optimizer.step()
    assert not torch.equal(params[0], before[0]) and torch.equal(params[1], before[1])
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])


@every
def test_named_parameters_keep_their_names(make) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = make(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@every
def test_a_tensor_for_a_learning_rate_may_change_in_place(make) -> None:
    params = parameters()
    others = copies(params)
    rate = torch.tensor(0.1, dtype=torch.float64)  # as 0.1 is
    optimizer, plain = make(params, lr=rate), make(others, lr=0.1)
    for step in range(4):
        give_gradients(params, step), give_gradients(others, step)
        optimizer.step(), plain.step()
        rate.mul_(0.5)
        plain.param_groups[0]["lr"] *= 0.5
    assert all(torch.equal(one, other) for one, other in zip(params, others, strict=True))
