"""Liveness of small graphs against sums by hand."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from oasis_fx.plan.liveness import moments

N, D = 32, 8
ROW = N * D * 4


def graph_of(function, *inputs):
    return make_fx(lambda *given: (function(*given),), tracing_mode="fake")(*inputs).graph


def test_a_chain_holds_what_is_still_read() -> None:
    def chain(x, w):
        a = x @ w
        return torch.sin(a) @ w  # sin is stored: a matmul reads it; it takes the place of a

    graph = graph_of(chain, torch.randn(N, D), torch.randn(D, D))
    first, second = graph.find_nodes(op="placeholder")
    found = {moment.node: moment for moment in moments(graph, {second.name})}
    mm, sin, mm_1 = [node.name for node in graph.nodes if node.op == "call_function"]
    assert found[mm].given == ROW and found[mm].temporary == ROW  # x and a
    assert found[sin].given == 0 and found[sin].temporary == ROW
    assert found[mm_1].temporary == ROW and found[mm_1].returned == ROW
    assert max(moment.total for moment in found.values()) == 2 * ROW
    assert first.name not in found


def test_what_is_fused_has_no_memory_and_keeps_what_it_is_made_of() -> None:
    def fused(x, w):
        a = x @ w
        b = x @ w.t()
        return ((a.exp() + b).tanh() * 2).sum(0)

    graph = graph_of(fused, torch.randn(N, D), torch.randn(D, D))
    found = moments(graph)
    assert max(moment.temporary for moment in found) == 2 * ROW  # a and b; exp, +, tanh and * have none
    assert found[-1].returned == D * 4


def test_what_is_read_again_after_a_kernel_is_stored() -> None:
    def residual(x, w):
        h = torch.sin(x)
        return h + torch.cos(h) @ w

    graph = graph_of(residual, torch.randn(N, D), torch.randn(D, D))
    by_name = {moment.node: moment for moment in moments(graph)}
    mm = next(node.name for node in graph.nodes if "mm" in node.name)
    assert by_name[mm].temporary == 3 * ROW  # h, its cosine and the product


def test_views_and_chunks() -> None:
    def logits(x, w):
        return torch.logsumexp((x @ w).view(2, N // 2, -1), -1)

    graph = graph_of(logits, torch.randn(N, D), torch.randn(D, 1000))
    weight = graph.find_nodes(op="placeholder")[1].name
    whole, chunked = (max(moments(graph, {weight}, 1000, chunks), key=lambda m: m.wide) for chunks in (1, 10))
    assert whole.wide == N * 1000 * 4 and whole.temporary >= whole.wide
    assert chunked.wide == whole.wide // 10 and chunked.total == whole.total - whole.wide + chunked.wide
