"""Kernels of small graphs, their FLOPs and bytes against counts by hand."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from oasis_fx.plan.fusion import kernels_of
from oasis_fx.plan.kernels import Kind

N, D, M = 32, 8, 16
ROW = N * D * 4  # bytes of a value [N, D]


def kernels(function, *inputs):
    def whole(*given):
        found = function(*given)
        return found if isinstance(found, tuple) else (found,)

    found = kernels_of(make_fx(whole, tracing_mode="fake")(*inputs).graph)
    matmuls = [kernel for kernel in found if kernel.kind is not Kind.FUSED]
    return matmuls, [kernel for kernel in found if kernel.kind is Kind.FUSED]


def test_flops_and_bytes_of_matmuls_and_of_a_chain_between_them() -> None:
    def function(x, w, u):
        return ((x @ w).exp() + 1).tanh() @ u

    (first, second), (chain,) = kernels(function, torch.randn(N, D), torch.randn(D, M), torch.randn(M, D))
    assert first.flops == second.flops == 2 * N * D * M
    assert first.num_bytes == 4 * (N * D + D * M + N * M) == second.num_bytes
    assert chain.num_bytes == 4 * 2 * N * M  # x @ w is read, its chain written, nothing of it in between
    assert chain.flops == (10 + 1 + 10) * N * M


def test_what_is_read_again_after_a_matmul_is_stored_once_and_read_twice() -> None:
    def function(x, w):
        h = torch.sin(x)
        return h + torch.cos(h) @ w

    (product,), (before, after) = kernels(function, torch.randn(N, D), torch.randn(D, D))
    assert product.num_bytes == 2 * ROW + 4 * D * D
    assert before.num_bytes == 3 * ROW  # x; h and its cosine are written
    assert after.num_bytes == 3 * ROW  # h and the product; the sum is written


def test_a_value_for_later_is_computed_where_it_is_needed() -> None:
    def function(x, w):
        late = x * 2  # nothing before the product needs it: it is not stored for it
        return late + (x @ w) @ w

    _, (after,) = kernels(function, torch.randn(N, D), torch.randn(D, D))
    assert after.num_bytes == 3 * ROW and after.flops == 2 * N * D


def test_what_a_matmul_parts_does_not_run_together() -> None:
    def function(x, w):
        return torch.cos(torch.sin(x) @ w) @ w

    products, chains = kernels(function, torch.randn(N, D), torch.randn(D, D))
    assert len(products) == 2 and [chain.num_bytes for chain in chains] == [2 * ROW, 2 * ROW]


def test_readers_of_one_value_share_the_reading() -> None:
    def function(x, y, z):
        return x * y, x + z

    _, (both,) = kernels(function, *(torch.randn(N, D) for _ in range(3)))
    assert both.num_bytes == 5 * ROW


def test_a_norm_reads_its_rows_once() -> None:
    def function(x, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True)) * scale

    _, (norm,) = kernels(function, torch.randn(N, D), torch.randn(D))
    assert norm.num_bytes == 2 * ROW + 4 * D


def test_views_are_read_by_their_own_size() -> None:
    def halves(x):
        return x[:, :2] + x[:, -2:]

    def expanded(x, row):
        return x * row.expand(N, D)

    def turned(x):
        return torch.cat((-x[:, D // 2 :], x[:, : D // 2]), -1)

    _, (sliced,) = kernels(halves, torch.randn(N, D))
    assert sliced.num_bytes == 4 * 3 * N * 2
    _, (product,) = kernels(expanded, torch.randn(N, D), torch.randn(1, D))
    assert product.num_bytes == 2 * ROW + 4 * D
    _, (rope,) = kernels(turned, torch.randn(N, D))
    assert rope.num_bytes == 2 * ROW


def test_a_gather_reads_what_it_gathers_and_constants_have_no_bytes() -> None:
    def function(table, tokens):
        return torch.nn.functional.embedding(tokens, table) + torch.full((N, D), 2.0)

    _, (gather,) = kernels(function, torch.randn(5000, D), torch.zeros(N, dtype=torch.long))
    assert gather.num_bytes == 2 * ROW + 8 * N


def test_attention_leaves_out_the_future_where_it_is_told_to() -> None:
    def attention(causal):
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    inputs = [torch.randn(2, 4, N, D) for _ in range(3)]
    (whole,), _ = kernels(attention(False), *inputs)
    (half,), _ = kernels(attention(True), *inputs)
    assert whole.kind is Kind.ATTENTION and whole.head == D
    assert whole.flops == 4 * 2 * 4 * N * N * D == 2 * half.flops
