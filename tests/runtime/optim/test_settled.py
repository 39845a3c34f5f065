"""What a step takes for granted from the last one changes no number, whatever happens in between."""

from __future__ import annotations

import random
import weakref

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend, rules, update_bases
from oasis_fx.runtime.optim import items

ALL = (OasisAdamW, OasisSGD, OasisLion, OasisMuon)


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.q, self.k = (torch.nn.Linear(width, width, bias=False) for _ in range(2))
        self.out = torch.nn.Linear(width, width)

    def forward(self, x):
        x = self.norm(x)
        return x + self.out(torch.tanh(self.q(x)) * self.k(x))


class Training:
    """A model and its optimizer; one that ``forgets`` takes nothing for granted."""

    def __init__(self, make, forgets: bool, **settings) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(Block(8), torch.nn.Linear(8, 8), Block(8))
        self.compiled = torch.compile(self.net, backend=oasis_backend(rank=3, inner="aot_eager", **settings))
        self.forgets = forgets
        weights = list(self.net.parameters())
        self.optimizer = make([{"params": weights[:5]}, {"params": weights[5:]}], lr=1e-2)

    def backward(self, number: int) -> None:
        weight = next(self.net.parameters())
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number)).to(weight)
        self.compiled(x).square().mean().backward()

    def step(self) -> str | None:
        if self.forgets:
            self.optimizer.rest = self.optimizer.plan = None
        try:
            self.optimizer.step()
        except (RuntimeError, ValueError) as error:
            return str(error)
        return None

    def numbers(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        kept = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        return [*self.net.parameters(), *kept]


def first_state(run: Training) -> dict:
    return run.optimizer.state[run.net[0].q.weight]


def replace_states(run: Training) -> None:
    for state in run.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key.startswith(("exp", "mom")):
                state[key] = value * 0.5


def cast_states(run: Training) -> None:
    for state in run.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key.startswith(("exp", "mom")):
                state[key] = value.to(torch.float64 if value.dtype == torch.float32 else torch.float32)


def write_states(run: Training) -> None:
    for state in run.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key.startswith(("exp", "mom")):
                value.mul_(0.5)


def lay_out_anew(run: Training) -> None:
    weight = run.net[1].weight
    weight.data = weight.data.t().contiguous().t()


def cast(run: Training) -> None:
    run.net.to(torch.float64 if run.net[1].weight.dtype == torch.float32 else torch.float32)


def swap(run: Training) -> None:
    """Exchange the contents of two parameters of one shape, whose states and gradients stay with the objects."""
    q, k = run.net[0].q.weight, run.net[0].k.weight
    q.data, k.data = k.data, q.data


def dense_gradient(run: Training) -> None:
    for weight in (run.net[0].q.weight, run.net[1].weight):
        if isinstance(weight.grad, LowRankGrad):
            weight.grad = weight.grad.to_dense()


def other_gradient(run: Training) -> None:
    """Give one weight the gradient of another, in the coordinates of another basis."""
    run.net[0].q.weight.grad = run.net[2].q.weight.grad


def no_gradient(run: Training) -> None:
    run.net[1].weight.grad = run.net[2].norm.weight.grad = None


def spoil(run: Training) -> None:
    gradient = run.net[0].out.bias.grad
    if gradient is not None:
        gradient.fill_(torch.inf)


def own_group(run: Training) -> None:
    groups = run.optimizer.param_groups
    weight = groups[1]["params"].pop()
    run.optimizer.add_param_group({"params": [weight], "lr": 2e-2})


def load(run: Training) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict())


# Between a backward pass and the step.
DISTURBANCES = {
    "nothing": lambda run: None,
    "a state is dropped": lambda run: run.optimizer.state.pop(run.net[0].q.weight, None),
    "all states are cleared": lambda run: run.optimizer.state.clear(),
    "states are replaced": replace_states,
    "states are cast": cast_states,
    "states are written to": write_states,
    "a checkpoint is loaded": load,
    "another learning rate": lambda run: run.optimizer.param_groups[0].update(lr=3e-2),
    "one learning rate": lambda run: [group.update(lr=1e-2) for group in run.optimizer.param_groups],
    "another decay": lambda run: run.optimizer.param_groups[1].update(weight_decay=0.1),
    "a group of its own": own_group,
    "a weight is laid out anew": lay_out_anew,
    "memory is exchanged": swap,
    "gradients are dense": dense_gradient,
    "a gradient in another basis": other_gradient,
    "gradients are missing": no_gradient,
    "a gradient is not finite": spoil,
    "bases move": lambda run: update_bases(run.net.parameters()),
    "bases move twice": lambda run: [update_bases(run.net.parameters()) for _ in range(2)],
    "an entry is added": lambda run: run.optimizer.state[run.net[1].weight].update(note=1),
}
# After a step.
AFTERWARDS = {
    "nothing": lambda run: None,
    "the model is cast": cast,
    "zeros for gradients": lambda run: run.optimizer.zero_grad(set_to_none=False),
    "a weight is frozen": lambda run: run.net[1].weight.requires_grad_(False),
    "all weights train": lambda run: run.net.requires_grad_(True),
    "graphs are forgotten": lambda run: torch._dynamo.reset(),
    "a step more": lambda run: run.step(),
}


@pytest.mark.parametrize("seed", [pytest.param(s, marks=[pytest.mark.slow] if s >= 2 else []) for s in range(10)])
@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_steps_are_bitwise_those_that_take_nothing_for_granted(make, seed) -> None:
    drawn = random.Random(seed)
    settings = drawn.choice([{}, {"tail": 2}, {"subspace": rules.Oja(every=2)}, {"subspace": rules.Oja(lr="auto")}])
    plan = []
    for _ in range(10):  # mostly nothing: a loop has to come to rest before it can be disturbed
        quiet = drawn.random() < 0.5
        plan.append(("nothing", "nothing") if quiet else (drawn.choice([*DISTURBANCES]), drawn.choice([*AFTERWARDS])))
    found = []
    for forgets in (False, True):
        run = Training(make, forgets, **settings)
        told = []
        for number, (before, after) in enumerate([("nothing", "nothing")] * 3 + plan):
            run.backward(number)
            DISTURBANCES[before](run)
            told.append(run.step())
            AFTERWARDS[after](run)
            if after != "zeros for gradients":
                run.optimizer.zero_grad()
        found.append((told, run.numbers()))
    (told, ours), (expected, theirs) = found
    assert told == expected, plan
    assert len(ours) == len(theirs)
    assert all(torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9)) for a, b in zip(ours, theirs, strict=True)), plan


@pytest.mark.parametrize("name", [*DISTURBANCES])
@pytest.mark.parametrize("make", [OasisAdamW, OasisLion], ids=lambda make: make.__name__)
def test_each_disturbance_of_a_loop_at_rest(make, name) -> None:
    found = []
    for forgets in (False, True):
        run = Training(make, forgets)
        told = []
        for number in range(7):
            run.backward(number)
            if number == 4:
                DISTURBANCES[name](run)
            told.append(run.step())
            run.optimizer.zero_grad()
        found.append((told, run.numbers()))
    (told, ours), (expected, theirs) = found
    assert told == expected
    assert len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"tail": 2}, {"subspace": rules.Oja(every=2)}, {"subspace": rules.Oja(lr="auto")}], ids=str
)
@pytest.mark.parametrize("make", ALL, ids=lambda make: make.__name__)
def test_a_loop_at_rest_looks_at_no_parameter_anew_and_plans_nothing(make, settings, monkeypatch) -> None:
    run = Training(make, False, **settings)
    looked_at: list[str] = []
    look = items._item
    monkeypatch.setattr(items, "_item", lambda *given: looked_at.append(given[-1]) or look(*given))
    for number in range(10):
        run.backward(number)
        if number == 6:
            looked_at.clear()
            plan = run.optimizer.plan
        assert run.step() is None
        run.optimizer.zero_grad()
        run.optimizer.param_groups[0]["lr"] *= 0.9  # as a schedule does
    assert looked_at == [] and run.optimizer.plan is plan


@pytest.mark.parametrize("spoilt", [False, True])
def test_gradients_live_no_longer_than_their_owner_wants(spoilt) -> None:
    run = Training(OasisAdamW, False, tail=2)
    for number in range(5):
        run.backward(number)
        held = [weakref.ref(run.net[0].q.weight.grad.factor), weakref.ref(run.net[0].norm.weight.grad)]
        if spoilt and number == 4:
            spoil(run)
        run.step()
        run.optimizer.zero_grad()
        assert all(ref() is None for ref in held)


def test_states_that_lie_side_by_side_are_saved_as_they_were_apart(tmp_path) -> None:
    """Entries are views of one buffer, which a file has once; a state dict that was loaded shares no memory with it."""
    sizes = []
    for forgets in (False, True):
        run = Training(OasisAdamW, forgets)
        for number in range(6):
            run.backward(number)
            run.step()
            run.optimizer.zero_grad()
            if number == 0:
                before = weakref.ref(first_state(run)["exp_avg"])
        moments = first_state(run)["exp_avg"]
        assert forgets or before() is None  # nothing holds the memory that they had
        assert (moments.untyped_storage().nbytes() > moments.nbytes) is not forgets
        torch.save(run.optimizer.state_dict(), tmp_path / "states.pt")
        sizes.append((tmp_path / "states.pt").stat().st_size)
    assert sizes[0] <= sizes[1]
    run = Training(OasisAdamW, False)
    run.optimizer.load_state_dict(torch.load(tmp_path / "states.pt", weights_only=True))
    run.backward(6)
    assert run.step() is None
