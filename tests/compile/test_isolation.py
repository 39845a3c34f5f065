"""Bases belong to the parameters of each call, not to what was seen at compile time."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend

from .small import EAGER, assert_exact, backward, batch, net


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_equal_layers(inner) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x):
            return torch.tanh(self.fc(x))

    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer() for _ in range(3))
    reference, x = copy.deepcopy(layers), torch.randn(5, 8, dtype=torch.float64)
    compiles = []
    backend = oasis_backend(rank=3, inner=inner)

    def counting(gm, inputs, **kwargs):
        compiles.append(gm)
        return backend(gm, inputs, **kwargs)

    for layer in layers:
        layer.compile(backend=counting)
    h, expected = x, x
    for layer, plain in zip(layers, reference, strict=True):
        h, expected = layer(h), plain(expected)
    h.square().sum().backward(), expected.square().sum().backward()
    assert_exact(layers, reference, {"0.fc", "1.fc", "2.fc"})
    assert len(compiles) == 2  # the first layer's input needs no gradient, the others' do: one graph for both
    assert len({id(layer.fc.weight.grad.basis) for layer in layers}) == 3


def test_a_second_model_with_the_same_code_has_its_own_bases() -> None:
    first, second = net(), net()
    with torch.no_grad():
        second[0].weight.mul_(-2)
    backend = oasis_backend(rank=3, **EAGER)
    for model in (first, second):
        reference = copy.deepcopy(model)
        backward(reference, batch())
        backward(torch.compile(model, backend=backend), batch())
        assert_exact(model, reference, {"0", "2"})
    assert first[0].weight.grad.subspace is not second[0].weight.grad.subspace


def test_two_backends_on_one_model_keep_apart() -> None:
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    for rank in (3, 5, 3):
        model.zero_grad()
        backward(torch.compile(model, backend=oasis_backend(rank=rank, **EAGER)), x)
        assert model[0].weight.grad.factor.shape == (20, rank)
        assert_exact(model, reference, {"0", "2"})


def test_a_weight_used_in_two_graphs_adds_both_parts_up() -> None:
    layer = torch.nn.Linear(6, 6, dtype=torch.float64)

    def twice(x):
        h = torch.tanh(layer(x))
        torch._dynamo.graph_break()
        return layer(h)

    reference = copy.deepcopy(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    reference(torch.tanh(reference(x))).square().sum().backward()
    torch.compile(twice, backend=oasis_backend(rank=3, **EAGER))(x).square().sum().backward()
    assert_exact(layer, reference, {"weight"})


def test_threads_do_not_share_state(in_threads) -> None:
    def work(seed: int) -> None:
        model, x = net(), batch(seed)
        reference = copy.deepcopy(model)
        compiled = torch.compile(model, backend=oasis_backend(rank=2 + seed, **EAGER))
        optimizer = OasisAdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            reference.load_state_dict(model.state_dict())
            reference.zero_grad()
            backward(compiled, x), backward(reference, x)
            assert_exact(model, reference, {"0", "2"})
            optimizer.step()

    in_threads(work, 3)


def test_a_deleted_model_frees_its_bases_and_parameters() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend)
    backward(compiled, batch())
    gone = [weakref.ref(model[0].weight), weakref.ref(model[0].weight.grad.basis)]
    model.zero_grad()
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    del backend
