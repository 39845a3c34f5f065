"""The price of recomputing each kind of operator, against counts by hand; what is never recomputed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from oasis_fx.memory.recompute_prices import recompute_price

N, D = 32, 16
ROW = N * D * 4


def prices(function, *shapes: tuple[int, ...]) -> dict[str, float]:
    """Price of each operator of a function of CPU tensors, by its name."""
    graph = make_fx(function, tracing_mode="fake")(*(torch.randn(shape) for shape in shapes)).graph
    nodes: list[fx.Node] = [node for node in graph.nodes if node.op == "call_function"]
    return {str(node.target).removeprefix("aten."): recompute_price(node) for node in nodes}


@torch.library.custom_op("oasis_fx_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


def test_matmuls_views_and_what_is_fused() -> None:
    found = prices(lambda x, w: (x @ w.t()).sin().sum(1), (N, D), (D, D))
    assert found == {
        "t.default": 0.0,
        "mm.default": 2 * N * D * D / 16,  # 16 FLOPs of a CPU in the time of a byte
        "sin.default": ROW,
        "sum.dim_IntList": N * 4 + ROW,  # what it makes and what it reads
    }


def test_a_flop_of_attention_is_dearer_than_one_of_a_matmul() -> None:
    """By 1.7, which was measured: at the price of a matmul, or of nothing, attention would be recomputed first."""
    found = prices(lambda q: F.scaled_dot_product_attention(q, q, q), (1, 2, N, D))
    (price,) = (price for name, price in found.items() if "attention" in name)
    flops = 2 * 2 * (2 * N * N * D)  # two heads; Q K^T and A V
    assert price == pytest.approx(1.7 * flops / 16)


def test_what_is_random_or_has_an_effect_is_never_recomputed() -> None:
    drop = prices(lambda x: F.dropout(x, 0.5), (N, D))
    assert any(price == math.inf for price in drop.values())
    attention = prices(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), (1, 2, N, D))
    assert any(price == math.inf for price in attention.values())
    assert prices(lambda x: x.clone().mul_(2), (N, D))["mul_.Tensor"] == math.inf


def test_an_operator_of_others_is_never_recomputed() -> None:
    """Nobody here knows what it costs, or whether it gives the same twice."""
    found = prices(lambda x: torch.ops.oasis_fx_test.twice(x).sin(), (N, D))
    assert found == {"oasis_fx_test.twice.default": math.inf, "sin.default": ROW}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: torch.linalg.svd(x)[0], "svd"),
        (lambda x: torch.linalg.qr(x)[0], "qr"),
        (lambda x: torch.linalg.cholesky(x), "cholesky"),
        (lambda x: torch.linalg.solve(x, x), "solve"),
        (lambda x: torch.linalg.inv(x), "inv"),
        (lambda x: torch.linalg.eigh(x)[0], "eigh"),
        (lambda x: torch.linalg.det(x), "det"),
        (lambda x: torch.fft.fft(x).real, "fft"),
        (lambda x: torch.linalg.solve_triangular(x, x, upper=True), "solve_triangular"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_computes_much_and_has_no_count_is_never_recomputed(function, name) -> None:
    found = prices(function, (D, D))
    dear = {operator: price for operator, price in found.items() if name in operator}
    assert dear and all(price == math.inf for price in dear.values()), found
