"""Inputs and buffers that a graph changes in place: gradients at every memory budget, against eager float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oasis_fx import oasis_backend
from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad

D = 8
BUDGETS = (None, 0.8, 0.5, 0.2, 0.0, "300B", 1.0)


class Net(nn.Module):
    """Two layers, a vector and a matrix that are buffers, and what a case does with them."""

    def __init__(self, case) -> None:
        super().__init__()
        self.a, self.b, self.case = nn.Linear(D, D), nn.Linear(D, D), case
        for name, shape in (("vector", (D,)), ("matrix", (5, D))):
            self.register_buffer(name, torch.rand(shape) + 0.5)
        self.register_buffer("count", torch.tensor([3]))
        self.norm, self.relu = nn.BatchNorm1d(D), nn.ReLU(inplace=True)
        self.spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))

    def forward(self, x):
        return self.case(self, x)


def normalised_by_a_buffer(net, x):
    h = net.a(x)
    y = (h - net.matrix[0]) / torch.sqrt(net.vector + 1e-5)
    with torch.no_grad():
        net.matrix.mul_(0.5).add_(h.mean(0), alpha=0.5)
        net.vector.mul_(0.5).add_(h.var(0), alpha=0.5)
    return net.b(torch.tanh(y))


def a_codebook_with_moving_averages(net, x):
    h = net.a(x)
    index = torch.cdist(h.detach(), net.matrix.clone()).argmin(1)
    code = net.matrix[index]
    with torch.no_grad():
        one_hot = F.one_hot(index, 5).to(h.dtype)
        net.matrix.mul_(0.9).add_(one_hot.t() @ h / (1 + one_hot.sum(0))[:, None], alpha=0.1)
    return net.b(torch.tanh(h + (code - h).detach()) * code) + (h - code).square().mean()


def an_input_changed(net, x):
    h, gate = net.a(x.clone()), torch.sigmoid(x)
    x.mul_(0.5)
    return net.b(h * gate)


def a_slice_of_an_input(net, x):
    y = net.a(x[1:].clone())
    x.mul_(0.5)
    return net.b(y)


def relu_in_place_behind_a_graph_break(net, x):
    h = net.a(x)
    torch._dynamo.graph_break()
    return net.b(net.relu(h))


def batch_norm(net, x):
    return net.b(torch.tanh(net.norm(net.a(x))))


def nested_views(net, x):
    view = x.view(-1, 2, D // 2).transpose(0, 1)[1]
    h = net.a(F.pad(view.clone(), (0, D // 2))) * torch.exp(view.clone()).sum(-1, keepdim=True)
    view.mul_(0.25)
    x[0].add_(1)
    return net.b(h)


def a_counter_that_noise_is_made_from(net, x):
    noise = torch.sin(torch.arange(D, dtype=x.dtype) * net.count * 1.7)  # float32 sines differ by compiler
    net.count.add_(1)
    return net.b(torch.tanh(net.a(x) * noise))


def unusual_views_of_buffers(net, x):
    h = net.a(x)
    pairs = torch.view_as_complex(net.matrix.unflatten(1, (D // 2, 2)).clone()).real.sum(0)
    gate = torch.sigmoid(net.vector.unfold(0, 2, 2) * 2).sum(0)
    tail = torch.exp(net.vector.as_strided((D // 2,), (1,), 2))
    net.matrix.mul_(0.5)
    net.vector.add_(1)
    return net.b(torch.tanh(h) * (pairs * tail).repeat(2) * gate.sum())


def a_queue_of_keys(net, x):
    h = F.normalize(net.a(x), dim=1)
    scores = h @ net.matrix.clone().t()
    with torch.no_grad():
        net.matrix.index_copy_(0, (net.count + torch.arange(3)) % 5, h[:3])
        net.count.add_(3)
    return torch.logsumexp(scores / 0.2, 1)


def spectral_normalisation(net, x):
    return net.b(torch.tanh(net.spectral(x)))


def weights_clamped(net, x):
    with torch.no_grad():
        net.a.weight.clamp_(-0.1, 0.1)
    y = net.b(torch.tanh(net.a(x) + F.linear(x, torch.sigmoid(net.a.weight))))
    net.a.weight.data.mul_(0.9)
    return y


def a_region_compiled_once(net, x):
    @torch.compiler.nested_compile_region
    def region(x, scale, weight):
        return torch.tanh(x @ weight.t() / torch.sqrt(scale + 1e-3))

    h = region(region(x, net.vector, net.a.weight), net.vector, net.a.weight)
    with torch.no_grad():
        net.vector.mul_(0.5)
    return net.b(h)


class _Counts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        ctx.count = count
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        scale = ctx.count.clone()
        ctx.count.add_(1.0)
        return gradient * scale, None


def a_buffer_changed_by_the_backward_pass(net, x):
    h = net.a(x) * torch.exp(net.vector * 0.1)
    return net.b(torch.tanh(_Counts.apply(h, net.vector)))


CASES = [
    normalised_by_a_buffer,
    a_codebook_with_moving_averages,
    an_input_changed,
    a_slice_of_an_input,
    relu_in_place_behind_a_graph_break,
    batch_norm,
    nested_views,
    a_counter_that_noise_is_made_from,
    unusual_views_of_buffers,
    a_queue_of_keys,
    spectral_normalisation,
    weights_clamped,
    a_region_compiled_once,
    a_buffer_changed_by_the_backward_pass,
]


def _results(run, net, x, calls=2):
    """Gradients after some calls whose backward passes wait for all of them, changed inputs and buffers."""
    net.zero_grad()
    inputs = [x.clone() for _ in range(calls)]
    outputs = [run(given) for given in inputs]
    for number, output in enumerate(outputs):
        (output * torch.linspace(0.5, 1.5 + number, output.numel()).view_as(output)).square().sum().backward()
    gradients = {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    dense = {name: g.to_dense() if isinstance(g, LowRankGrad) else g.clone() for name, g in gradients.items()}
    return dense | {name: buffer.clone() for name, buffer in net.named_buffers()} | dict(enumerate(inputs))


def _compare(case, inner, budgets, **settings) -> None:
    torch.manual_seed(0)
    net, x = Net(case).double(), torch.randn(6, D, dtype=torch.float64)
    reference = copy.deepcopy(net)
    expected = _results(reference, reference, x)
    for budget in budgets:
        torch._dynamo.reset()
        compiled = copy.deepcopy(net)
        keywords = {} if budget is None else {"memory_budget": budget}
        backend = oasis_backend(rank=D, inner=inner, **keywords, **settings)
        found = _results(torch.compile(compiled, backend=backend), compiled, x)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=f"{name} at {budget}")


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_eager_at_every_budget(case) -> None:
    _compare(case, "aot_eager", BUDGETS)


@pytest.mark.parametrize("case", [a_slice_of_an_input, normalised_by_a_buffer])
def test_inductor_recomputes_nothing_from_what_has_changed(case) -> None:
    # Stock Inductor does, in both and with its default settings: an error of 0.5 and of 0.2 of a gradient's norm.
    _compare(case, "inductor", (None, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inductor_at_every_budget(case) -> None:
    _compare(case, "inductor", (None, 0.5, 0.0, "300B"))


@pytest.mark.parametrize("budget", [None, 0.0])
def test_graphs_without_a_weight_to_rewrite_are_right_too(budget) -> None:
    for case in (normalised_by_a_buffer, a_slice_of_an_input):
        _compare(case, "inductor" if budget is None else "aot_eager", (budget,), exclude="*")


@pytest.mark.parametrize("within", [True, False], ids=["in the model", "by the caller"])
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_an_input_changed_outside_of_the_graph_is_an_error_where_it_is_read_once_more(within, budget) -> None:
    """Dynamo runs ``t_`` of an input outside of the graph, as a caller would. The changed input gives no gradient."""
    weight = torch.nn.Parameter(torch.randn(1, 12, dtype=torch.float64))

    def model(x):
        hidden = torch.tanh(torch.cat([x, x], -1))
        found = torch.tanh(hidden @ weight.t())
        if within:
            x.t_()
        return found

    x = torch.randn(3, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(model(x.clone()).sum(), [weight])
    backend = oasis_backend(rank=D, inner="aot_eager", memory_budget=budget)
    found = torch.compile(model, backend=backend)(x)
    if not within:
        x.mul_(2)
    if budget == 0:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            found.sum().backward()
        return
    found.sum().backward()
    gradient = weight.grad.to_dense() if isinstance(weight.grad, LowRankGrad) else weight.grad
    basis = weight.grad.basis.detach() if isinstance(weight.grad, LowRankGrad) else torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected @ basis @ basis.T)
