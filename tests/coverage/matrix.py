"""One model of the matrix under the backend and under its inner compiler alone."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from zoo import DEFAULT_RANK, Entry

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx._torch.compiler import compile_caches_disabled, inductor_lowering
from oasis_fx.backend import OasisBackend
from oasis_fx.compile.lowering import run_node_by_node
from oasis_fx.settings import Settings

Backend = Callable[..., Any]


@dataclass
class Run:
    """Two steps of a model on one batch; all of the second."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    num_graphs: int
    num_breaks: int


def backends(inner: str) -> tuple[Backend | str, OasisBackend]:
    """The inner compiler, and ours over it. Of Inductor all but the code generation, which takes minutes here."""
    if inner == "aot_eager":
        return inner, oasis_backend(rank=DEFAULT_RANK, inner=inner)

    def graphs_of_inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        return inductor_lowering(gm, inputs, {}, run_node_by_node)

    return graphs_of_inductor, OasisBackend(Settings(rank=DEFAULT_RANK), inner_compile=run_node_by_node)


def run(model: torch.nn.Module, inputs: Mapping[str, Any], backend: Backend | str) -> Run:
    """Compile and train for two steps, without an optimizer."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        model.zero_grad()
        random.seed(0), torch.manual_seed(0)
        with compile_caches_disabled():
            outputs = [o for o in torch.utils._pytree.tree_leaves(compiled(**inputs)) if _is_differentiable(o)]
            loss = sum((o * torch.randn(o.shape, dtype=torch.float64).to(o)).sum() for o in outputs)
            loss.backward()
    return Run(
        [o.detach() for o in outputs],
        {name: weight.grad for name, weight in model.named_parameters()},
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
    )


def make(entry: Entry) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model in training mode, without dropout, and its inputs, in the entry's dtype."""
    torch.manual_seed(0)
    model, inputs = entry.make()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() < 2 and weight.is_floating_point() and type(weight.data) is torch.Tensor:
                weight.add_(torch.randn_like(weight) / 10)  # zeros and ones would hide a wrong gradient
    model = model.to(entry.dtype).train()
    cast = {k: v.to(entry.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model, cast


def compare(entry: Entry, inner: str) -> tuple[Run, Run, OasisBackend, torch.nn.Module]:
    """Runs of equal models: by the inner compiler, and by ours."""
    model, inputs = make(entry)
    reference = copy.deepcopy(model)
    stock, ours = backends(inner)
    with torch._dynamo.config.patch(**entry.config):
        expected = run(reference, inputs, stock)
        found = run(model, inputs, ours)
    return expected, found, ours, model


def reasons_for_dense(model: torch.nn.Module, backend: OasisBackend) -> dict[str, str]:
    """Why each trainable weight of two or more dimensions has a dense gradient, by its name."""
    reports = backend.report()
    skipped = {row.name: row.reason for report in reports for row in report.skipped}
    by_weight = {w: skipped[n] for n, w in model.named_parameters(remove_duplicate=False) if n in skipped}
    dense = [(n, w) for n, w in model.named_parameters() if w.requires_grad and w.dim() > 1 and not _is_low_rank(w)]
    return {name: by_weight.get(weight, "torch.compile gives no graph with it to a backend") for name, weight in dense}


def table_row(entry: Entry, model: torch.nn.Module, backend: OasisBackend) -> str:
    """The entry's row of docs/coverage.md."""
    weights = [w for w in model.parameters() if w.requires_grad and w.dim() > 1]
    reasons = Counter(reasons_for_dense(model, backend).values())
    why = "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    return f"| {entry.name} | {len(weights)} | {sum(map(_is_low_rank, weights))} | {why} |"


def _is_low_rank(weight: torch.Tensor) -> bool:
    return isinstance(weight.grad, LowRankGrad)


def _is_differentiable(output: Any) -> bool:
    return isinstance(output, torch.Tensor) and output.requires_grad
