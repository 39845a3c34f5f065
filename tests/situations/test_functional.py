"""torch.func, and gradients of gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from oasis_fx import LowRankGrad


def call(function, parameters, x):
    return functional_call(function, {f"_orig_mod.{name}": p for name, p in parameters.items()}, (x,))


def loss_of(function):
    return lambda parameters, x: call(function, parameters, x).square().sum()


def test_parameters_of_another_model_get_their_own_gradients(kit) -> None:
    model, other = kit.Net(), kit.Net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    reference = copy.deepcopy(other)
    compiled = kit.compile_eager(model).run
    call(compiled, dict(other.named_parameters()), kit.batch()).square().sum().backward()
    kit.backward(reference, kit.batch())
    assert kit.count_low_rank(other, reference) == 4
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tensors_that_are_no_parameters_get_dense_gradients(kit) -> None:
    model = kit.Net()
    compiled = kit.compile_eager(model).run
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    doubled = {name: leaf * 2 for name, leaf in leaves.items()}
    reference = kit.Net()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(2)
    kit.backward(reference, kit.batch())
    for given, factor in ((leaves, 1), (doubled, 2)):
        for leaf in leaves.values():
            leaf.grad = None
        if factor == 1:
            with torch.no_grad():
                for leaf in leaves.values():
                    leaf.mul_(2)
        call(compiled, given, kit.batch()).square().sum().backward()
        for leaf, parameter in zip(leaves.values(), reference.parameters(), strict=True):
            assert not isinstance(leaf.grad, LowRankGrad)
            torch.testing.assert_close(leaf.grad, factor * parameter.grad, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            if factor == 1:
                for leaf in leaves.values():
                    leaf.div_(2)


TRANSFORMS = {
    "gradients of parameters": lambda f, p, x: grad(loss_of(f))(p, x),
    "gradients per sample": lambda f, p, x: vmap(grad(loss_of(f)), (None, 0))(p, x[:, None]),
    "gradient of the input": lambda f, p, x: grad(lambda y: f(y).square().sum())(x),
    "vmap": lambda f, p, x: vmap(f)(x[:, None]),
    "jvp": lambda f, p, x: jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, p, x: jacrev(f)(x),
}


@pytest.mark.parametrize("warm", [False, True], ids=["first call", "after a training step"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_compiled_model_are_exact_and_dense(kit, name, warm) -> None:
    """torch runs the model itself under a transform: no rewritten graph takes part."""
    model = kit.Net()
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    compiled = kit.compile_eager(model).run
    if warm:
        kit.backward(compiled, kit.batch(9))
    found = TRANSFORMS[name](compiled, parameters, kit.batch())
    torch._dynamo.reset()
    plain = torch.compile(kit.Net(), backend="eager")
    expected = TRANSFORMS[name](plain, parameters, kit.batch())
    pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, expected)), strict=True)
    for one, other in pairs:
        assert type(one) is torch.Tensor
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_transforms_inside_the_compiled_function_are_exact_and_dense(kit) -> None:
    model = kit.Net()
    parameters = dict(model.named_parameters())

    def per_sample(p, x):
        return vmap(grad(lambda p, y: functional_call(model, p, (y,)).square().sum()), (None, 0))(p, x[:, None])

    found = kit.compile_eager(per_sample).run(parameters, kit.batch())
    expected = per_sample(parameters, kit.batch())
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients_are_refused(kit) -> None:
    model = kit.Net()
    compiled = kit.compile_eager(model).run
    x = kit.batch().requires_grad_()
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.square().sum().backward()


@pytest.mark.parametrize("how", ["grad", "backward"])
def test_a_penalty_on_a_low_rank_gradient_is_refused(kit, how) -> None:
    """The gradient has no graph: the penalty would be lost in silence."""
    model = kit.Net()
    loss = kit.compile_eager(model).run(kit.batch()).square().sum()
    with pytest.raises(RuntimeError, match="create_graph=True: a weight rewritten by oasis_fx"):
        if how == "grad":
            torch.autograd.grad(loss, model.blocks[0].up.weight, create_graph=True)
        else:
            loss.backward(create_graph=True)
