"""Weights, gradients and moments whose elements lie in different orders: steps are those of torch's AdamW and SGD."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import OasisAdamW, OasisLion, OasisMuon, OasisSGD
from oasis_fx.integrations.checkpoint import from_tensors, to_tensors
from oasis_fx.runtime.optim.strides import alike, is_packed, state_layout

SHAPE = (6, 4, 3, 2)
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: torch.stack([t, torch.full_like(t, 7.0)], dim=-1)[..., 0],
}
GRADIENTS = {
    **LAYOUTS,
    "expanded": lambda t: t[:1, :, :1, :].expand(SHAPE),
    "conjugated part": lambda t: torch.view_as_complex(torch.stack([t, -t], dim=-1)).conj().imag,
}


def gradient(kind: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    return GRADIENTS[kind](torch.randn(SHAPE, generator=torch.Generator().manual_seed(step)).to(dtype))


def weight_of(layout: str, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99)).to(dtype)
    return torch.nn.Parameter(LAYOUTS[layout](values))


STOCK = {
    "adamw": (lambda p: OasisAdamW(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
    "sgd": (lambda p: OasisSGD(p, 0.1), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "muon": (lambda p: OasisMuon(p, 0.1), lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
}


@pytest.mark.parametrize("of_gradient", GRADIENTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("kind", STOCK)
def test_a_step_is_that_of_stock_whatever_the_strides(kind, of_weight, of_gradient) -> None:
    weight, plain = weight_of(of_weight), torch.nn.Parameter(weight_of("contiguous").detach().clone())
    ours, theirs = (make([w]) for make, w in zip(STOCK[kind], (weight, plain), strict=True))
    strides = weight.stride()
    for step in range(3):
        weight.grad = gradient(of_gradient, step, torch.float64)
        plain.grad = weight.grad.contiguous()
        ours.step(), theirs.step()
    torch.testing.assert_close(weight, plain, rtol=1e-12, atol=1e-12)
    assert weight.stride() == strides


@pytest.mark.parametrize("of_gradient", GRADIENTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_lion_whatever_the_strides(of_weight, of_gradient) -> None:
    weight, plain = weight_of(of_weight), weight_of("contiguous")
    for step, optimizer in zip(range(3), [OasisLion([weight, plain], 0.1)] * 3, strict=True):
        weight.grad = gradient(of_gradient, step, torch.float64)
        plain.grad = weight.grad.contiguous()
        optimizer.step()
    assert torch.equal(weight, plain) and not torch.equal(weight, weight_of("contiguous"))


@pytest.mark.parametrize("make", [OasisAdamW, OasisSGD, OasisLion, OasisMuon], ids=lambda make: make.__name__)
def test_what_lies_between_the_elements_of_a_weight_stays(make) -> None:
    """The kernel took as many numbers from the first on as the weight has elements: half of them were others'."""
    store = torch.full((5, 8), 3.0)
    weight = torch.nn.Parameter(store[:, ::2])
    optimizer = make([weight], lr=0.1)
    weight.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert bool((store[:, 1::2] == 3.0).all()) and bool((store[:, ::2] != 3.0).all())


def test_moments_follow_a_weight_that_is_laid_out_anew() -> None:
    conv, plain = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(4, 6, 3)
    plain.load_state_dict(conv.state_dict())
    ours, theirs = OasisAdamW(conv.parameters(), 0.1), torch.optim.AdamW(plain.parameters(), 0.1, foreach=False)
    for step in range(4):
        if step == 2:
            conv.to(memory_format=torch.channels_last)
        for p, q in zip(conv.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        ours.step(), theirs.step()
    assert ours.state[conv.weight]["exp_avg"].stride() == conv.weight.stride() != plain.weight.stride()
    for p, q in zip(conv.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("road", ["torch", "flat"])
def test_a_convolution_with_channels_last_resumes_bitwise(road, bits) -> None:
    def build():
        torch.manual_seed(0)
        net = torch.nn.Conv2d(32, 64, 3).to(memory_format=torch.channels_last)
        return net, OasisAdamW(net.parameters(), 0.1, state_bits=bits)

    def train(net, optimizer, steps) -> None:
        for step in steps:
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    net, optimizer = build()
    train(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    if road == "flat":
        saved = from_tensors(*to_tensors(saved))
    again, resumed = build()
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(saved)
    assert again.weight.stride() == net.weight.stride() and not net.weight.is_contiguous()
    if bits == 32:
        assert resumed.state[again.weight]["exp_avg"].stride() == net.weight.stride()
    for model, opt in ((net, optimizer), (again, resumed)):
        train(model, opt, range(2, 5))
    assert torch.equal(net.weight, again.weight) and torch.equal(net.bias, again.bias)


@pytest.mark.parametrize("make", [OasisAdamW, OasisSGD, OasisLion, OasisMuon], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_backward_pass_through_a_weight_that_was_stepped_since_is_refused(make, dtype) -> None:
    """As with torch's: its gradient would be that of a weight which is no more."""
    weight = torch.nn.Parameter(torch.ones(3, 3, dtype=dtype))
    optimizer = make([weight], lr=0.1)
    weight.grad = torch.ones_like(weight)
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", STOCK)
def test_complex_parameters_are_pairs_of_real_ones(kind, dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(5, 4, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    plain = copy.deepcopy(weight)
    ours, theirs = (make([w]) for make, w in zip(STOCK[kind], (weight, plain), strict=True))
    for step in range(3):
        given = torch.randn(4, 5, dtype=dtype, generator=torch.Generator().manual_seed(step)).t().conj()
        weight.grad, plain.grad = given, given.clone()
        ours.step(), theirs.step()
    torch.testing.assert_close(weight, plain)
    weight.grad = plain.grad * complex(float("nan"), 1)
    before = weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="not finite"):
        ours.step()
    assert torch.equal(weight, before)


def test_lion_steps_both_parts_of_a_complex_parameter_by_their_signs() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    weight.grad = torch.tensor([3 - 4j, -1e-3 + 2j])
    OasisLion([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.5 + 0.5j, 0.5 - 0.5j]))


def test_large_gradients_are_finite() -> None:
    """Their sum of squares is not."""
    weight, plain = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    weight.grad, plain.grad = torch.full((4,), 1e30), torch.full((4,), 1e30)
    OasisSGD([weight], lr=1e-31).step(), torch.optim.SGD([plain], lr=1e-31).step()
    assert torch.equal(weight, plain) and bool((weight < 1).all())


def test_empty_parameters() -> None:
    weight, other = torch.nn.Parameter(torch.ones(0, 4)), torch.nn.Parameter(torch.ones(2))
    optimizer = OasisAdamW([weight, other], lr=0.1, weight_decay=0.0)
    weight.grad = torch.ones(0, 4)
    optimizer.step()
    other.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(other.detach(), torch.full((2,), 0.9))


def test_strides() -> None:
    plain = torch.zeros(3, 4)
    assert is_packed(plain.T) and is_packed(plain[:, :1][:1]) and not is_packed(plain[:, ::2])
    assert not is_packed(plain[:1].expand(3, 4)) and is_packed(torch.zeros(()))
    assert alike(plain, torch.ones(3, 4)) and not alike(plain, torch.zeros(4, 3).T)
    assert alike(torch.zeros(1, 4), torch.zeros(4, 1).T)  # no element is elsewhere
    for weight in (plain, plain.T, plain[:, ::2], plain.T[::2]):
        state = state_layout(torch.arange(float(weight.numel())).view(weight.shape), weight)
        assert state.stride() == torch.zeros_like(weight).stride()
        assert torch.equal(state.reshape(-1), torch.arange(float(weight.numel())))


def test_a_checkpoint_in_memory_is_not_trained_on() -> None:
    """torch hands the tensors of the state dict over as they are: two optimizers would write to one step count."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    one, other = (OasisAdamW([w], lr=0.1) for w in weights)
    weights[0].grad = torch.ones(3)
    one.step()
    saved = one.state_dict()
    other.load_state_dict(saved)
    before = copy.deepcopy(saved)
    weights[1].grad = torch.ones(3)
    other.step()
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(one.state[weights[0]][key], before["state"][0][key])
        assert not torch.equal(other.state[weights[1]][key], before["state"][0][key])
