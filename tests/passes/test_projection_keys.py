"""One weight used in several ways in one graph: each use has the projection of its own rows of X."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.graph.matricization import as_rows

X = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model, x, rank: int = 3):
    """The model after a backward pass through the backend, and a copy of it after one in eager mode."""
    plain = copy.deepcopy(model)
    torch.compile(model, backend=oasis_backend(rank, inner="aot_eager"), fullgraph=True)(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    return model, plain


def assert_projected(weight, plain) -> None:
    assert isinstance(weight.grad, LowRankGrad)
    expected = as_rows(plain.grad, weight.grad.features) @ weight.grad.basis.detach()
    torch.testing.assert_close(weight.grad.factor, expected, rtol=1e-10, atol=1e-12)


def statistic(rows, weight):
    return rows.T @ (rows @ weight.grad.basis.detach())


def test_convolutions_of_one_activation_with_other_strides(product) -> None:
    """Strides and dilations that lead to patches of equal number and shape, so that no shape tells."""

    def twice(x, w):
        # 6 x 6 images: patches of 2 x 2 at stride 2, and dilated patches at stride 2 of a padded image.
        return F.conv2d(x, w, stride=2) + F.conv2d(x, w, stride=2, dilation=2, padding=1)

    model, plain = gradients(product(twice, 5, 3, 2, 2), IMAGES)
    assert_projected(model.weight, plain.weight)
    rows = torch.cat(
        [
            F.unfold(IMAGES, 2, stride=2, **more).transpose(1, 2).flatten(0, 1)
            for more in ({}, {"dilation": 2, "padding": 1})
        ]
    )
    torch.testing.assert_close(model.weight.grad.subspace.statistic, statistic(rows, model.weight))


def test_an_activation_and_its_transpose(product) -> None:
    """A square activation: P of its columns has the shape of that of its rows."""
    model, plain = gradients(product(lambda x, w: F.linear(x, w) + 2 * F.linear(x.t(), w), 5, 6), X)
    assert_projected(model.weight, plain.weight)
    torch.testing.assert_close(model.weight.grad.subspace.statistic, statistic(torch.cat([X, X.T]), model.weight))


def test_a_convolution_keeps_its_other_gradients() -> None:
    """The operator makes the gradients of input, weight and bias at once; only one of them is replaced."""
    model = torch.nn.Conv2d(3, 5, 2, stride=2, dtype=torch.float64)
    plain, x, y = copy.deepcopy(model), IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    torch.compile(model, backend=oasis_backend(3, inner="aot_eager"))(x).sin().sum().backward()
    plain(y).sin().sum().backward()
    assert_projected(model.weight, plain.weight)
    torch.testing.assert_close(model.bias.grad, plain.bias.grad)
    torch.testing.assert_close(x.grad, y.grad)


class _Weighed(torch.autograd.Function):
    """``x w^T + tanh(x) w^T``, whose backward pass adds the two terms of dW in one operator, by a factor."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return F.linear(x, w) + 3 * F.linear(x.tanh(), w)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return None, torch.add(dy.T @ x, dy.T @ x.tanh(), alpha=3)


def test_a_sum_with_a_factor_is_right(product) -> None:
    def function(x, w):
        return _Weighed.apply(x, w) + 0 * F.linear(x, w).detach()

    model, plain = gradients(product(function, 5, 6), X)
    found = model.weight.grad
    if isinstance(found, LowRankGrad):
        assert_projected(model.weight, plain.weight)
    else:
        torch.testing.assert_close(found, plain.weight.grad)
