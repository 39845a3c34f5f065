"""Updates of all optimizers against their equations in float64, over layouts, strides, dtypes, gates and steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD
from oasis_fx.runtime.optim.base import SubspaceOptimizer
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate

LR, DECAY, RANK, STEPS = 0.125, 0.25, 3, 3
LAYOUTS = {  # shape, features, strides
    "linear": ((6, 8), (1, 2), "contiguous"),
    "linear, columns first": ((6, 8), (1, 2), "reversed"),
    "Conv1D": ((8, 6), (0, 1), "contiguous"),
    "convolution": ((6, 2, 2, 2), (1, 4), "contiguous"),
    "convolution, channels last": ((6, 2, 2, 2), (1, 4), "channels last"),
    "experts [e, m, n]": ((2, 3, 8), (2, 3), "contiguous"),
    "experts [e, n, m]": ((2, 8, 3), (1, 2), "contiguous"),
    "experts, every second": ((2, 8, 3), (1, 2), "every second"),
}
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GATES = {"none": None, "open": True, "shut": False}


# The equations: of a gradient, be it G [m, r] or dW, the direction U; states begin at zero


@dataclass
class Adam:
    beta1: float = 0.75
    beta2: float = 0.9
    eps: float = 1e-3
    m: float | torch.Tensor = 0.0
    v: float | torch.Tensor = 0.0
    t: int = 0

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        return (self.m / (1 - self.beta1**self.t)) / ((self.v / (1 - self.beta2**self.t)).sqrt() + self.eps)

    def factor(self, m: int, n: int) -> float:
        return math.sqrt(n / RANK)


@dataclass
class SGD:
    nesterov: bool
    m: float | torch.Tensor = 0.0

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        self.m = 0.75 * self.m + g
        return g + 0.75 * self.m if self.nesterov else self.m

    def factor(self, m: int, n: int) -> float:
        return 1.0


@dataclass
class Lion:
    """Decays are powers of two, and so are gradients, so that signs are the same in every dtype."""

    m: float | torch.Tensor = 0.0

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        u = torch.sign(0.5 * self.m + 0.5 * g)
        self.m = 0.25 * self.m + 0.75 * g
        return u

    def factor(self, m: int, n: int) -> float:
        return math.sqrt(n / RANK)


@dataclass
class Muon:
    m: float | torch.Tensor = 0.0
    norms: list[float] = field(default_factory=list)

    def direction(self, g: torch.Tensor) -> torch.Tensor:
        self.m = 0.75 * self.m + g
        u, _, vh = torch.linalg.svd(self.m, full_matrices=False)
        o = u @ vh
        if self.norms:
            o = o * min(1.0, 1.1 * self.norms[-1] / float(o.norm()))
        self.norms.append(float(o.norm()))
        return o

    def factor(self, m: int, n: int) -> float:
        return 0.2 * math.sqrt(max(m, n)) * math.sqrt(min(m, n) / min(m, RANK))


def adam_settings(**more):
    return {"lr": LR, "weight_decay": DECAY, "betas": (0.75, 0.9), "eps": 1e-3, **more}


KINDS = {
    "adamw": (lambda p: OasisAdamW(p, **adam_settings(stochastic_rounding=False)), Adam, Adam),
    "sgd": (lambda p: OasisSGD(p, LR, 0.75, DECAY, stochastic_rounding=False), lambda: SGD(False), lambda: SGD(False)),
    "nesterov": (
        lambda p: OasisSGD(p, LR, 0.75, DECAY, nesterov=True, stochastic_rounding=False),
        lambda: SGD(True),
        lambda: SGD(True),
    ),
    "lion": (lambda p: OasisLion(p, LR, (0.5, 0.25), DECAY, stochastic_rounding=False), Lion, Lion),
    "muon": (lambda p: OasisMuon(p, momentum=0.75, **adam_settings(stochastic_rounding=False)), Muon, Adam),
}


def laid_out(values: torch.Tensor, strides: str) -> torch.Tensor:
    if strides == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    if strides == "reversed":
        order = list(reversed(range(values.dim())))
        return values.permute(order).contiguous().permute(order)
    if strides == "every second":
        return torch.stack([values, values], dim=-1)[..., 0]
    return values.contiguous()


def gradient(kind: str, shape, step: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    if kind == "lion":
        values = torch.tensor([-4.0, -1.0, 1.0, 4.0])[torch.randint(4, tuple(shape), generator=generator)]
    else:
        values = torch.randn(shape, generator=generator)
    return values.to(dtype)


def rows_of(weight: torch.Tensor, features) -> torch.Tensor:
    """[m, n], by indices: experts one below the other, features in the order of the weight's dimensions."""
    first, last = features
    others = [dim for dim in range(weight.dim()) if not first <= dim < last]
    inner = [dim for dim in range(weight.dim()) if first <= dim < last]
    n = math.prod(weight.shape[dim] for dim in inner)
    return weight.detach().double().clone().permute(others + inner).reshape(-1, n)


def begin(optimizer: SubspaceOptimizer, like: torch.Tensor, low_rank: bool) -> dict:
    state = {"step": torch.zeros(())}
    for name in optimizer.states_of(low_rank):
        state.update(optimizer.new_state(name, like, optimizer.param_groups[0]))
    return state


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_low_rank_update(kind, layout, dtype, gate) -> None:
    make, equations, _ = KINDS[kind]
    shape, features, strides = LAYOUTS[layout]
    weight = torch.nn.Parameter(
        laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype), strides)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected, reference, optimizer = rows_of(weight, features), equations(), make([weight])
    m, n = expected.shape
    q = torch.linalg.qr(torch.randn(n, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(8))).Q.to(
        wide
    )
    state = begin(optimizer, torch.empty(m, RANK, dtype=wide), True)
    kept = weight.detach().clone()
    settings = optimizer.settings_of(optimizer.param_groups[0], weight.dtype)
    for step in range(STEPS):
        g = gradient(kind, (RANK, m), step, dtype).T  # as some graphs hand it over, rows side by side
        update = LowRankUpdate(weight, g, q, features, state)
        with torch.no_grad():
            given = None if GATES[gate] is None else torch.tensor(GATES[gate])
            optimizer.step_low_rank([update], Step(settings, given, torch.Generator()))
        u = reference.direction(g.double())
        expected = (1 - LR * DECAY) * expected - LR * reference.factor(m, n) * u @ q.double().T
    if gate == "shut":
        assert torch.equal(weight, kept) and float(state["step"]) == 0
        assert not any(state[name].any() for name in optimizer.states)
        return
    assert float(state["step"]) == STEPS and weight.stride() == laid_out(weight.detach(), strides).stride()
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(rows_of(weight, features), expected, rtol=tolerance, atol=tolerance)
    first = state[optimizer.states[0]].double()
    torch.testing.assert_close(first, reference.m, rtol=max(1e-11, tolerance), atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_gradient", ["contiguous", "reversed"])
@pytest.mark.parametrize("layout", ["linear, columns first", "convolution, channels last", "experts, every second"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_update(kind, layout, of_gradient, dtype, gate) -> None:
    make, _, equations = KINDS[kind]
    shape, _, strides = LAYOUTS[layout]
    weight = torch.nn.Parameter(
        laid_out(torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype), strides)
    )
    kept, expected, reference, optimizer = (
        weight.detach().clone(),
        weight.detach().clone().double(),
        equations(),
        make([weight]),
    )
    state = begin(optimizer, weight, False)
    settings = optimizer.settings_of(optimizer.param_groups[0], weight.dtype)
    for step in range(STEPS):
        g = laid_out(gradient(kind, shape, step, dtype), of_gradient)
        with torch.no_grad():
            given = None if GATES[gate] is None else torch.tensor(GATES[gate])
            optimizer.step_dense([DenseUpdate(weight, g, state)], Step(settings, given, torch.Generator()))
        expected = (1 - LR * DECAY) * expected - LR * reference.direction(g.double())
    if gate == "shut":
        assert torch.equal(weight, kept) and float(state["step"]) == 0
        assert not any(state[name].any() for name in optimizer.states_of(False))
        return
    assert float(state["step"]) == STEPS
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(weight.detach().double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("low_rank", [True, False])
def test_eight_bits(low_rank) -> None:
    """The first step is exact: moments are rounded when it is over. Later ones are off by hundredths of a step."""
    weight = torch.nn.Parameter(torch.randn(64, 80, generator=torch.Generator().manual_seed(9)))
    optimizer, reference = OasisAdamW([weight], **adam_settings(state_bits=8, rank_scaling=False)), Adam()
    q = torch.linalg.qr(torch.randn(80, 64, generator=torch.Generator().manual_seed(8))).Q
    state = begin(optimizer, torch.empty(64, 64) if low_rank else weight, low_rank)
    assert state["exp_avg"].dtype == torch.uint8
    expected, settings = (
        weight.detach().clone().double(),
        optimizer.settings_of(optimizer.param_groups[0], weight.dtype),
    )
    for step in range(4):
        g = gradient("adamw", (64, 64) if low_rank else (64, 80), step, torch.float32)
        with torch.no_grad():
            if low_rank:
                optimizer.step_low_rank(
                    [LowRankUpdate(weight, g, q, (1, 2), state)], Step(settings, None, torch.Generator())
                )
            else:
                optimizer.step_dense([DenseUpdate(weight, g, state)], Step(settings, None, torch.Generator()))
        u = reference.direction(g.double())
        expected = (1 - LR * DECAY) * expected - LR * (u @ q.double().T if low_rank else u)
        error = (weight.detach().double() - expected).square().mean().sqrt() / LR
        assert float(error) < (1e-5 if step == 0 else 0.03 * step)
