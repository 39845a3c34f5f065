"""From a graph of Dynamo to compiled code that calls the runtime: what happens on every compile, warm or cold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from functorch.compile import make_boxed_func
from torch import fx

from oasis_fx._torch.compiler import (
    RESTARTS,
    aot_eager_lowering,
    caches_may_be_left_out,
    compile_caches_disabled,
    inductor_lowering,
    is_aot_compile,
)
from oasis_fx._torch.fake_tensors import known_fake
from oasis_fx.compile.joint import Trace, observe_traces
from oasis_fx.compile.lender import OnUse
from oasis_fx.compile.partitioner import JointPartitioner
from oasis_fx.compile.pipeline import dynamo_passes, run_passes
from oasis_fx.compile.runtime_inputs import Compiled, call_with_runtime_inputs
from oasis_fx.distributed.gradient_sync import GradientSync
from oasis_fx.errors import Refused, survive
from oasis_fx.graph.edits import copy_dynamo_graph
from oasis_fx.graph.facts import DynamoFacts, LiftedWeight, WeightGroup
from oasis_fx.graph.runtime_inputs import RuntimeInputs
from oasis_fx.settings import Settings

STAYS_DENSE = "gradients of a graph stay dense"
_AOT_COMPILE = (
    "aot_compile saves compiled code alone, and a graph that trains in subspaces needs the bases of each call: train "
    "with torch.compile(model, backend=oasis_backend(...)), whose compile caches outlive the process, and save what "
    "only predicts with torch's own backend"
)


@dataclass
class CompiledGraph:
    """What the backend keeps of one compiled graph, for the report and the printer.

    Attributes:
        facts: what the passes over Dynamo's graph found.
        trace: what the passes over the joint graph did; None while unknown, as when a compile cache had the result.
        retrace: runs the passes once more, without caches and code generation. It returns None where nothing that
            the graph returns needs gradients.
        syncs: what averages gradients of the graph over ranks.
    """

    facts: DynamoFacts
    trace: Trace | None = None
    retrace: Callable[[], Trace | None] | None = field(default=None, repr=False)
    syncs: WeakSet[GradientSync] = field(default_factory=WeakSet, repr=False)

    @property
    def names(self) -> Mapping[int, str]:
        """Parameter names by position among the graph's inputs."""
        return self.facts.names

    @property
    def groups(self) -> tuple[WeightGroup, ...]:
        """The weights that share a basis, group by group."""
        return self.facts.groups

    @property
    def reasons(self) -> Mapping[int, str]:
        """Why weights were left alone before any pass over the joint graph, by position."""
        return self.facts.reasons

    @property
    def layout(self) -> RuntimeInputs | None:
        """Where the runtime's inputs stand; None where there is no group."""
        return self.facts.layout

    @property
    def lifted(self) -> tuple[LiftedWeight, ...]:
        """The weights of all groups as the passes over the joint graph see them."""
        return self.facts.lifted


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    options: Mapping[str, Any],
    inner_compile: Compiled | None = None,
    on_use: OnUse | None = None,
) -> tuple[Compiled, CompiledGraph]:
    """Compile one training graph with its weights in subspaces.

    Args:
        gm: Dynamo's graph; not changed.
        example_inputs: its inputs, real or fake.
        settings: of the backend.
        options: Inductor's, from the backend and from `torch.compile`.
        inner_compile: in place of Inductor's code generation, for the printer.
        on_use: called with each subspace that the graph takes, and the names of its weights.
    """
    try:
        lifted_gm = copy_dynamo_graph(gm)
        record = CompiledGraph(run_passes(lifted_gm, DynamoFacts(), dynamo_passes(example_inputs, settings)))
        if record.groups:
            if is_aot_compile():
                raise Refused(_AOT_COMPILE)
            return _lower_lifted(lifted_gm, example_inputs, record, settings, options, inner_compile, on_use)
        return compile_plainly(gm, example_inputs, settings, options, inner_compile), record
    except (Refused, *RESTARTS):
        raise
    except Exception as error:
        # Also what torch finds wrong with a graph that has our inputs. What it finds wrong with the graph as it came is
        # raised once more by this call, as stock torch would.
        compiled = compile_alone(gm, example_inputs, settings, options, inner_compile)
        survive(error, STAYS_DENSE, stacklevel=3)
        return compiled, CompiledGraph(DynamoFacts())


def compile_alone(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    options: Mapping[str, Any],
    inner_compile: Compiled | None = None,
) -> Compiled:
    """Compile a graph by the inner compiler with nothing of ours in it, where something of ours has failed."""
    if settings.inner == "aot_eager":
        return aot_eager_lowering(gm, example_inputs)
    return inductor_lowering(gm, example_inputs, dict(options), inner_compile)


def _lower_lifted(
    lifted_gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    record: CompiledGraph,
    settings: Settings,
    options: Mapping[str, Any],
    inner_compile: Compiled | None,
    on_use: OnUse | None,
) -> tuple[Compiled, CompiledGraph]:
    """Compile a graph with the runtime's inputs, and complete its record."""
    inputs = [*example_inputs, *record.facts.fakes.values()]
    compiled, record.trace = _compile(lifted_gm, inputs, record.lifted, settings, options, inner_compile)
    fakes = [known_fake(given) for given in inputs]  # what is kept must not keep the user's tensors
    record.retrace = lambda: _retrace(lifted_gm, fakes, record.lifted, settings, options)
    return call_with_runtime_inputs(compiled, record.facts, example_inputs, on_use, record.syncs), record


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    lifted: tuple[LiftedWeight, ...],
    settings: Settings,
    options: Mapping[str, Any],
    inner_compile: Compiled | None,
) -> tuple[Compiled, Trace | None]:
    """Compile a lifted graph; the trace is None where a compile cache had the result."""
    traces: list[Trace] = []
    partitioner = JointPartitioner(lifted, settings.budget)
    with observe_traces(traces.append), caches_may_be_left_out():
        if settings.inner == "aot_eager":
            compiled = aot_eager_lowering(gm, inputs, partitioner)
        else:
            compiled = inductor_lowering(gm, inputs, {**options, "custom_partitioner_fn": partitioner}, inner_compile)
    return compiled, traces[0] if traces else None


def _retrace(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    lifted: tuple[LiftedWeight, ...],
    settings: Settings,
    options: Mapping[str, Any],
) -> Trace | None:
    """Run the passes over a lifted graph once more, on the fake values of its inputs."""
    with compile_caches_disabled(), torch.enable_grad():
        _, trace = _compile(gm, inputs, lifted, settings, options, run_node_by_node)
    return trace


def run_node_by_node(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
    """Run a graph node by node. It stands in for Inductor's code generation."""
    return make_boxed_func(fx.Interpreter(gm).run)


def compile_plainly(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    options: Mapping[str, Any],
    inner_compile: Compiled | None = None,
) -> Compiled:
    """Compile a graph as the inner compiler alone would, with gradients that are right where it changes its inputs."""
    ours = settings.budget is not None or torch.is_grad_enabled()  # without gradients there is nothing to partition
    partitioner = JointPartitioner((), settings.budget) if ours else None
    with caches_may_be_left_out():  # the partitioner of ours may fail
        if settings.inner == "aot_eager":
            return aot_eager_lowering(gm, example_inputs, partitioner)
        patches = {**options, "custom_partitioner_fn": partitioner} if ours else dict(options)
        return inductor_lowering(gm, example_inputs, patches, inner_compile)
