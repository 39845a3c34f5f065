"""What a step could save in which no basis moves, under `every=k`: C = X^T P and ||X||^2 are computed and dropped.

    python -m benchmarks.unused_statistics --model 1024x1 --batch 1 --seq 512

Forward and backward pass of one model in four versions, in turns:

    in the graph        as oasis_fx compiles it
    operator, due       C by an opaque operator that asks whether the step is due, and computes it
    operator, not due   the same operator, which returns memory that nobody has written to
    none                graphs without C and ||X||^2: what could be saved at most
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from tabulate import tabulate
from torch import fx

from benchmarks import models
from oasis_fx import oasis_backend
from oasis_fx.compile import runtime_inputs
from oasis_fx.passes import project_activations
from oasis_fx.runtime.subspaces.rules import BatchRule
from oasis_fx.runtime.subspaces.store import STORE

_is_due, _num_calls = True, 0
_library = torch.library.Library("oasis_fx_benchmark", "FRAGMENT")
_library.define("statistic(Tensor x_t, Tensor p) -> Tensor")


def _statistic(x_t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    global _num_calls
    _num_calls += 1
    return torch.mm(x_t, p) if _is_due else x_t.new_empty(x_t.shape[0], p.shape[1])


for kind in ("CPU", "CUDA"):
    _library.impl("statistic", _statistic, kind)
torch.library.register_fake("oasis_fx_benchmark::statistic", lambda x_t, p: x_t.new_empty(x_t.shape[0], p.shape[1]))


@contextlib.contextmanager
def by_operator() -> Iterator[None]:
    """Within: C is computed by the operator. It is the product whose second factor is P, which is one itself."""
    insert, mm = project_activations.insert_after, torch.ops.aten.mm.default

    def instead(graph: fx.Graph, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if target is mm and args[1].target is mm:
            target = torch.ops.oasis_fx_benchmark.statistic.default
        return insert(graph, node, target, *args, **kwargs)

    with mock.patch.object(project_activations, "insert_after", instead):
        yield


def without() -> Any:
    """Return a context within which no rule wants a statistic."""
    return mock.patch.object(runtime_inputs, "StatisticRule", BatchRule)


class Version:
    """A compiled model and what its forward and backward passes took."""

    def __init__(self, args: argparse.Namespace, context: Any, is_due: bool) -> None:
        self.model, self.batch = models.build(args)
        self.weights = [weight for weight in self.model.parameters() if weight.dim() == 2]
        self.is_due, self.device = is_due, args.device
        self.model.compile(backend=oasis_backend(rank=args.rank, inner=args.inner))
        with context:
            self.step()
        self.seconds: list[float] = []

    def step(self) -> float:
        global _is_due, _num_calls
        _is_due, _num_calls = self.is_due, 0
        start = self._now()
        self.model(**self.batch).loss.backward()
        taken, self.num_calls = self._now() - start, _num_calls
        for weight in self.model.parameters():
            weight.grad = None
        for weight in self.weights:
            for subspace in STORE.all_of(weight):
                subspace.drop_statistic()
        return taken

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time() / torch.get_num_threads()  # other work on the machine does not count
        torch.cuda.synchronize()
        return time.perf_counter()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1024x1", help=models.NAMES)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--inner", default="inductor", help="aot_eager: without generated code")
    args = parser.parse_args(given)
    with torch._inductor.config.patch(force_disable_caches=True):  # their keys do not tell the versions apart
        made = {
            "in the graph": Version(args, contextlib.nullcontext(), True),
            "operator, due": Version(args, by_operator(), True),
            "operator, not due": Version(args, by_operator(), False),
            "none": Version(args, without(), True),
        }
    for _ in range(args.steps):
        for version in made.values():
            version.seconds.append(version.step())
    first = made["in the graph"].seconds
    rows = []
    for name, version in made.items():
        ratios = [one / other for one, other in zip(version.seconds, first, strict=True)]
        least, median = min(version.seconds), statistics.median(version.seconds)
        rows.append([name, 1e3 * least, 1e3 * median, statistics.median(ratios), version.num_calls])
    headers = ["", "ms, least", "ms, median", "ratio", "calls of the operator"]
    print(tabulate(rows, headers, floatfmt=("", ".1f", ".1f", ".3f", ""), tablefmt="github"))


if __name__ == "__main__":
    main()
