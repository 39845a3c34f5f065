"""Joint graphs for the tests of the passes, made the way the backend makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import fx

from oasis_fx._torch.compiler import fx_graph_cse
from oasis_fx.compile.lowering import CompiledGraph, lower
from oasis_fx.graph.edits import copy_graph
from oasis_fx.graph.facts import JointFacts, LiftedWeight
from oasis_fx.settings import Settings


@dataclass
class Joint:
    """A joint graph before any rewrite, and what the passes are told about it."""

    gm: fx.GraphModule
    record: CompiledGraph
    num_forward_outputs: int

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    @property
    def lifted(self) -> tuple[LiftedWeight, ...]:
        return self.record.lifted

    @property
    def facts(self) -> JointFacts:
        return JointFacts(self.num_forward_outputs, self.lifted)

    def skipped_by_name(self) -> dict[str, str]:
        return {self.record.names[index]: reason for index, reason in self.record.reasons.items()}

    def run(self, primals: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """Compute the joint graph: the user's outputs, then a gradient (or None) for each primal."""
        return list(fx.Interpreter(self.gm).run(*primals, *tangents))

    def random_inputs(self, seed: int = 0) -> tuple[list[Any], list[Any]]:
        """Random primals and tangents of the shapes and dtypes that the graph takes."""
        generator = torch.Generator().manual_seed(seed)
        primals: list[Any] = []
        tangents: list[Any] = []
        for node in self.graph.find_nodes(op="placeholder"):
            fake = node.meta["val"]
            made = torch.randn(fake.shape, generator=generator, dtype=torch.float64).to(fake.dtype)
            (tangents if "tangents" in node.name else primals).append(made)
        return primals, tangents


@pytest.fixture
def capture_joint(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Joint]:
    """Return a function that gives the joint graph of ``function(*inputs)``, not rewritten."""

    def capture(function: Callable[..., Any], *inputs: Any, rank: Any = 2, **settings: Any) -> Joint:
        graphs: list[tuple[fx.GraphModule, int]] = []
        records: list[CompiledGraph] = []

        def keep(
            gm: fx.GraphModule,
            joint_inputs: Any,
            *,
            lifted: Any,
            budget: Any,
            num_fwd_outputs: int,
            **kwargs: Any,
        ) -> Any:
            gm.graph = fx_graph_cse(gm.graph)
            graphs.append((copy_graph(gm), num_fwd_outputs))
            return min_cut_rematerialization_partition(gm, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
            compiled, record = lower(gm, example_inputs, Settings(rank=rank, inner="aot_eager", **settings), {})
            records.append(record)
            return compiled

        monkeypatch.setattr("oasis_fx.compile.partitioner.partition_joint", keep)
        torch.compiler.reset()
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
        (record,) = records
        gm, num_outputs = graphs[0] if graphs else (fx.GraphModule({}, fx.Graph()), 0)
        return Joint(gm, record, num_outputs)

    return capture


class Product(torch.nn.Module):
    """One weight, read by whatever function it is given."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.weight)


@pytest.fixture
def product() -> type[Product]:
    return Product
