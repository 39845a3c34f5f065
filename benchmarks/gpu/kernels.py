"""The kernels of the optimizer step: errors against float64, and bandwidth beside that of a copy.

    python -m benchmarks.gpu.kernels --out FOLDER [--device cpu --tiny]

Errors are those of the change of the weights, ``||W+ - W - exact|| / ||exact||``: for bfloat16 of the mean over `DRAWS`
roundings, which stochastic rounding leaves unbiased, so that it falls with their number. ``stays`` is whether weights
kept their values where the gate was false. Bandwidth counts each entry of a
weight read once and written once; a copy reads and writes as many bytes. On a CPU nothing runs: there the tests run the
kernels in Triton's interpreter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.gpu.arguments import parser
from benchmarks.gpu.record import Record

DRAWS = 64
SHAPES = ((4, 14336, 4096), (16, 4096, 4096), (4, 4096, 14336))
TIMES = 15


def main() -> None:
    args = parser(__doc__).parse_args()
    record = Record(args.out, "kernels", args.device)
    record.add({"runs": args.device == "cuda"})
    if args.device != "cuda":
        return
    rows = []
    for case in _error_cases():
        found = _guarded(_errors, *case.values())
        record.add({**case, "dtype": str(case["dtype"])} | found)
        rows.append([*case.values(), *found.values()])
    print(tabulate(rows, ["dtype", "rank", "turned", "error", "stays"], floatfmt=".2g"), flush=True)
    copied = _copy_bandwidth()
    record.add({"copy_gb_per_s": copied})
    print(f"a copy: {copied:.0f} GB/s")
    rows = []
    for case in _speed_cases(args.tiny):
        found = _guarded(_bandwidth, *case.values())
        record.add({**case, "dtype": str(case["dtype"])} | found)
        rows.append([*case.values(), *found.values()])
    print(tabulate(rows, ["weights", "rank", "dtype", "rounds", "turned", "GB/s", "ms"], floatfmt=".3g"), flush=True)
    found = _guarded(_dense_bandwidth)
    record.add({"dense": "bfloat16, stochastic rounding"} | found)
    print("AdamW on dense bfloat16 weights", found, flush=True)


def _speed_cases(tiny: bool) -> Iterator[dict[str, Any]]:
    kinds = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False))
    for rank in (32,) if tiny else (32, 128, 256):
        for shape in SHAPES:
            for dtype, rounds in kinds:
                yield {"shape": shape, "rank": rank, "dtype": dtype, "rounds": rounds, "turned": False}
    yield {"shape": SHAPES[0], "rank": 128, "dtype": torch.bfloat16, "rounds": True, "turned": True}


def _error_cases() -> Iterator[dict[str, Any]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rank in (1, 33, 128, 512):
            yield {"dtype": dtype, "rank": rank, "turned": False}
        yield {"dtype": dtype, "rank": 128, "turned": True}


def _guarded(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return measure(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _milliseconds(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(TIMES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in times)


def _copy_bandwidth() -> float:
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _milliseconds(lambda: target.copy_(source)) / 1e6


def _weights(count: int, m: int, n: int, dtype: torch.dtype, turned: bool) -> list[torch.Tensor]:
    if turned:
        return [torch.randn(n, m, device="cuda").to(dtype).t() for _ in range(count)]
    return [torch.randn(m, n, device="cuda").to(dtype) for _ in range(count)]


def _bandwidth(
    shape: tuple[int, int, int], rank: int, dtype: torch.dtype, rounds: bool, turned: bool
) -> dict[str, float]:
    from oasis_fx.runtime.optim.kernels.add_products import add_products_

    count, m, n = shape
    weights = _weights(count, m, n, dtype, turned)
    bank = torch.randn(count, m, rank, device="cuda")
    bases = [torch.randn(n, rank, device="cuda") for _ in range(count)]
    gate = torch.ones((), dtype=torch.bool, device="cuda")

    def run() -> None:
        add_products_(
            weights, bank, bases, lr=1e-4, weight_decay=0.1, factor=1.0, gate=gate, seed=5 if rounds else None
        )

    took = _milliseconds(run)
    return {"gb_per_s": 2 * sum(weight.nbytes for weight in weights) / took / 1e6, "ms": took}


def _dense_bandwidth() -> dict[str, float]:
    from oasis_fx.runtime.optim.kernels.dense_adamw import step_dense_adamw_

    def tensors() -> list[torch.Tensor]:
        sizes = [128256 * 2048, *[2048] * 32]
        return [torch.rand(size, device="cuda").to(torch.bfloat16) for size in sizes]

    weights, gradients, means, seconds = (tensors() for _ in range(4))
    biases = torch.full((len(weights), 2), 0.5, device="cuda")

    def run() -> None:
        step_dense_adamw_(weights, gradients, means, seconds, biases, lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8,
                          weight_decay=0.1, gate=None, seed=3)  # fmt: skip

    took = _milliseconds(run)
    ours = {"gb_per_s": 7 * sum(weight.nbytes for weight in weights) / took / 1e6, "ms": took}
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    stock = torch.optim.AdamW(parameters, fused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return ours | {"stock_fused_ms": _milliseconds(stock.step)}  # type: ignore[arg-type]


def _errors(dtype: torch.dtype, rank: int, turned: bool) -> dict[str, Any]:
    """Of three weights whose sizes no block divides, two of which share a basis."""
    from oasis_fx.runtime.optim.kernels.add_products import add_products_

    m, n = 333, 520
    weights = _weights(3, m, n, dtype, turned)
    bank = torch.randn(3, m, rank, device="cuda")
    bases = [torch.randn(n, rank, device="cuda") for _ in range(2)]
    bases.append(bases[0])
    before = [weight.double() for weight in weights]
    exact = [-0.05 * w + 0.1 * u.double() @ q.double().T for w, u, q in zip(before, bank, bases, strict=True)]
    draws = DRAWS if dtype == torch.bfloat16 else 1
    mean = [torch.zeros_like(w) for w in before]
    for draw in range(draws):
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
        seed = draw if dtype == torch.bfloat16 else None
        add_products_(weights, bank, bases, lr=0.1, weight_decay=0.5, factor=1.0, gate=None, seed=seed)
        for total, weight in zip(mean, weights, strict=True):
            total += weight.double() / draws
    error = max(
        float((after - old - change).norm() / change.norm())
        for after, old, change in zip(mean, before, exact, strict=True)
    )
    kept = [weight.clone() for weight in weights]
    shut = torch.zeros((), dtype=torch.bool, device="cuda")
    add_products_(weights, bank, bases, lr=0.1, weight_decay=0.5, factor=1.0, gate=shut, seed=None)
    same = all(torch.equal(one, other) for one, other in zip(weights, kept, strict=True))
    return {"relative_error": error, "stays": same}


if __name__ == "__main__":
    main()
