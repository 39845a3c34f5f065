"""The rates of this CPU for `oasis_fx.plan.devices`: the least time of 25 of each operator.

python -m benchmarks.device_rates
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from tabulate import tabulate

TIMES = 25


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for m, n, k in ((2048, 1024, 1024), (2048, 2816, 1024), (2048, 1024, 2816), (2048, 512, 512), (1024, 1024, 2048)):
        a, b = torch.randn(m, k), torch.randn(n, k)
        rows.append(_row(f"matmul {m} x {k} x {n}", lambda a=a, b=b: a @ b.T, flops=2 * m * n * k))
    for n, r in ((1024, 32), (2816, 32), (512, 32)):
        x, q, p = torch.randn(2048, n), torch.randn(n, r), torch.randn(2048, r)
        flops, size = 2 * 2048 * n * r, x.nbytes + q.nbytes + p.nbytes
        rows.append(_row(f"P of 2048 x {n}, rank {r}", lambda x=x, q=q: x @ q, flops, size))
        rows.append(_row(f"C of 2048 x {n}, rank {r}", lambda x=x, p=p: x.T @ p, flops, size))
    rows += _attention(4, 16, 512, 64) + _attention(8, 8, 256, 64)
    for n in (2816, 1408):
        rows += _fused(2048, n)
    rows += _adamw()
    print(tabulate(rows, ["", "ms", "GFLOP/s", "GB/s"], tablefmt="github", floatfmt=".3g"))


def _row(name: str, run: Callable[[], object], flops: float = 0.0, size: float = 0.0) -> list[object]:
    run()
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    took = min(times)
    return [name, 1e3 * took, flops / took / 1e9 or None, size / took / 1e9 or None]


def _attention(batch: int, heads: int, seq: int, head: int) -> list[list[object]]:
    rows = []
    flops = 4.0 * batch * heads * seq * seq * head
    q, k, v = (torch.randn(batch, heads, seq, head, requires_grad=True) for _ in range(3))
    for causal in (False, True):

        def forward(causal: bool = causal) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        out = forward()
        gradient = torch.randn_like(out)
        own = flops / 2 if causal else flops
        name = f"attention {batch} x {heads} x {seq} x {head}{', causal' if causal else ''}"
        with torch.no_grad():
            rows.append(_row(name, forward, own))
        rows.append(_row(f"{name}, backward", lambda out=out, g=gradient: torch.autograd.grad(out, (q, k, v), g, retain_graph=True), 2.5 * own))  # fmt: skip  # noqa: E501
    return rows


def _fused(tokens: int, n: int) -> list[list[object]]:
    gate, up, other = (torch.randn(tokens, n) for _ in range(3))
    scale = torch.ones(n)

    @torch.compile
    def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(gate) * up

    @torch.compile
    def add(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return gate + up

    @torch.compile
    def norm(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x + residual
        return h, h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * scale

    size = gate.nbytes
    return [
        _row(f"a + b of {tokens} x {n}", lambda: add(gate, up), size=3 * size),
        _row(f"SwiGLU of {tokens} x {n}", lambda: swiglu(gate, up), size=3 * size),
        _row(f"RMSNorm of a sum of {tokens} x {n}", lambda: norm(gate, other), size=4 * size),
    ]


def _adamw() -> list[list[object]]:
    weights = [torch.nn.Parameter(torch.randn(1024, 1024)) for _ in range(24)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)
    return [_row("fused AdamW", optimizer.step, size=7 * sum(weight.nbytes for weight in weights))]  # type: ignore


if __name__ == "__main__":
    main()
