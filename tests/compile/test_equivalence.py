"""A model under the backend against the same model under the inner compiler alone (design.md, invariants 1 to 4)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.graph.matricization import as_rows
from tests import tiny_llama

INNER = ["aot_eager", "inductor"]


class SwiGLU(torch.nn.Module):
    def __init__(self, n: int = 24, m: int = 40) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(n)
        self.gate, self.up = torch.nn.Linear(n, m, bias=False), torch.nn.Linear(n, m, bias=False)
        self.down = torch.nn.Linear(m, n, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def mlp():
    net = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 7))
    return net, (torch.randn(9, 12),), 2


def swiglu():
    return torch.nn.Sequential(SwiGLU(), SwiGLU()), (torch.randn(2, 5, 24),), 6


def llama():
    return tiny_llama.llama(), (torch.randint(tiny_llama.VOCABULARY, (2, 10)),), 14


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, use_cache=False, n_positions=16)
    return GPT2LMHeadModel(config).eval(), (torch.randint(0, 64, (2, 10)),), 8


MODELS: list[Callable[..., tuple[torch.nn.Module, tuple[torch.Tensor, ...], int]]] = [
    mlp,
    swiglu,
    llama,
    gpt2,
]


def output_of(model, inputs) -> torch.Tensor:
    result = model(*inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def train_step(model, inputs, backend) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """One forward and backward pass with a fixed incoming gradient; the output and the inputs' gradients."""
    torch._dynamo.reset()
    inputs = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    out = output_of(torch.compile(model, backend=backend), inputs)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=out.dtype))
    return out.detach(), [x.grad for x in inputs]


def dense_in_coordinates(gradient: LowRankGrad, dense: torch.Tensor) -> torch.Tensor:
    return as_rows(dense, gradient.features) @ gradient.basis.detach().to(dense.dtype)


@pytest.mark.parametrize(
    ("dtype", "inner"),
    [
        pytest.param(torch.float64, "aot_eager", id="f64-aot_eager"),
        pytest.param(torch.float64, "inductor", id="f64-inductor", marks=pytest.mark.slow),
        pytest.param(torch.float32, "aot_eager", id="f32-aot_eager", marks=pytest.mark.slow),
        pytest.param(torch.float32, "inductor", id="f32-inductor", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("make", MODELS, ids=lambda f: f.__name__)
def test_equal_to_the_inner_compiler_alone(make, dtype, inner) -> None:
    torch.manual_seed(0)
    model, inputs, num_rewritten = make()
    model = model.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    reference = copy.deepcopy(model)
    expected, expected_dx = train_step(reference, inputs, inner)
    found, found_dx = train_step(model, inputs, oasis_backend(rank=4, inner=inner))

    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for one, other in zip(found_dx, expected_dx, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    rewritten = 0
    for (name, weight), (_, dense) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if isinstance(weight.grad, LowRankGrad):
            rewritten += 1
            projected = dense_in_coordinates(weight.grad, dense.grad)
            scale = projected.abs().max()
            torch.testing.assert_close(weight.grad.factor, projected, rtol=0, atol=float(tolerance * scale), msg=name)
        else:
            torch.testing.assert_close(weight.grad, dense.grad, rtol=0, atol=0)
    assert rewritten == num_rewritten


@pytest.mark.parametrize("inner", INNER)
def test_full_rank_gradients_are_the_dense_ones(inner) -> None:
    torch.manual_seed(0)
    model = SwiGLU().double()
    x = (torch.randn(3, 7, 24, dtype=torch.float64),)
    reference = copy.deepcopy(model)
    train_step(reference, x, inner)
    train_step(model, x, oasis_backend(rank=1000, inner=inner))  # more than n: becomes n
    assert sum(isinstance(weight.grad, LowRankGrad) for weight in model.parameters()) == 3
    for weight, dense in zip(model.parameters(), reference.parameters(), strict=True):
        if isinstance(weight.grad, LowRankGrad):
            assert weight.grad.factor.shape == weight.shape
            torch.testing.assert_close(weight.grad.to_dense(), dense.grad, rtol=1e-11, atol=1e-11)
        else:
            torch.testing.assert_close(weight.grad, dense.grad, rtol=0, atol=0)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    leading=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    rank=st.one_of(st.integers(1, 12), st.floats(0.05, 0.95)),
    bias=st.booleans(),
    conv1d=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
)
def test_any_shape(leading, n, m, rank, bias, conv1d, layout) -> None:
    torch.manual_seed(0)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn((n, m) if conv1d else (m, n), dtype=torch.float64))
            self.bias = torch.nn.Parameter(torch.randn(m, dtype=torch.float64)) if bias else None

        def forward(self, x):
            out = x @ self.weight if conv1d else F.linear(x, self.weight)
            return torch.tanh(out if self.bias is None else out + self.bias)

    x = torch.randn(*leading, n, dtype=torch.float64)
    if layout == "transposed" and x.dim() > 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":
        x = torch.randn(*leading, 2 * n, dtype=torch.float64)[..., ::2]
    model = Layer()
    reference = copy.deepcopy(model)
    expected, expected_dx = train_step(reference, (x,), "aot_eager")
    found, found_dx = train_step(model, (x,), oasis_backend(rank=rank, inner="aot_eager"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_dx, expected_dx, rtol=0, atol=0)
    gradient, dense = model.weight.grad, reference.weight.grad
    if isinstance(gradient, LowRankGrad):
        columns = rank if isinstance(rank, int) else max(1, round(rank * n))
        assert gradient.factor.shape == (m, min(columns, n))
        projected = dense_in_coordinates(gradient, dense)
        torch.testing.assert_close(gradient.factor, projected, rtol=1e-10, atol=1e-10)
    else:
        torch.testing.assert_close(gradient, dense, rtol=0, atol=0)
    assert isinstance(gradient, LowRankGrad) or not leading  # a vector times a matrix is no matmul: left dense
    if bias:
        torch.testing.assert_close(model.bias.grad, reference.bias.grad, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("inner", INNER)
def test_small_and_empty_batches(inner, batch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    reference = copy.deepcopy(model)
    x = (torch.randn(batch, 6, dtype=torch.float64),)
    expected, expected_dx = train_step(reference, x, inner)
    found, found_dx = train_step(model, x, oasis_backend(rank=3, inner=inner))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(found_dx, expected_dx, rtol=0, atol=0)
    for weight, dense in zip(model.parameters(), reference.parameters(), strict=True):
        gradient = weight.grad
        if isinstance(gradient, LowRankGrad):
            projected = dense_in_coordinates(gradient, dense.grad)
            torch.testing.assert_close(gradient.factor, projected, rtol=1e-12, atol=1e-12)
        else:
            torch.testing.assert_close(gradient, dense.grad, rtol=0, atol=0)
    assert isinstance(model[0].weight.grad, LowRankGrad)
