"""What an optimizer step asks of its host: operators of torch, and launches of our kernels. On a GPU that is its time.

python -m benchmarks.step_operations
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models
from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.optim.kernels import dispatch


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    cases = [
        (dtype, bits, kernels) for dtype in ("float32", "bfloat16") for bits in (32, 8) for kernels in (False, True)
    ]
    rows = [[dtype, bits, *count(dtype, bits, kernels)] for dtype, bits, kernels in cases]
    print(tabulate(rows, ["weights", "bits of states", "operators", "kernels of ours"], tablefmt="github"))


def count(dtype: str, bits: int, kernels: bool) -> tuple[int, int]:
    """Of the fourth step of a Llama of 8 blocks; kernels are counted, not run."""
    launches: list[int] = []
    made = dispatch.Kernels(lambda *_, **__: launches.append(1), lambda *_, **__: launches.append(1))
    dispatch.DEVICES = ("cpu",) if kernels else ()
    dispatch._kernels = lambda: made  # type: ignore[assignment]
    dispatch._next_seed = lambda generator: 0
    args = argparse.Namespace(model="128x8", layers=None, vocabulary=1024, batch=2, seq=64, dtype=dtype, device="cpu")
    model, batch = models.build(args)
    torch._dynamo.reset()
    model.compile(backend=oasis_backend(rank=32, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-5, state_bits=bits)
    for _ in range(4):
        model(**batch).loss.backward()
        launches.clear()
        with Count() as counted:
            optimizer.step()
        optimizer.zero_grad()
    return sum(counted.calls.values()), len(launches)


if __name__ == "__main__":
    main()
