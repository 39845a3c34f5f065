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
    known_fake,
)
from oasis_fx.compile.groups import WeightGroup, choose_groups
from oasis_fx.compile.partitioner import JointPartitioner
from oasis_fx.compile.pipeline import Trace, observe_traces, partition_joint
from oasis_fx.compile.runtime_inputs import (
    Compiled,
    OnUse,
    call_with_runtime_inputs,
    fake_runtime_inputs,
    lifted_weights,
)
from oasis_fx.distributed.gradient_sync import GradientSync
from oasis_fx.errors import Refused, survive
from oasis_fx.graph.facts import LiftedWeight
from oasis_fx.passes.inline_regions import inline_regions
from oasis_fx.passes.lift_runtime_inputs import lift_runtime_inputs
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
        names: parameter names by position among the graph's inputs.
        groups: the weights that share a basis, group by group.
        lifted: the same as the passes see them.
        reasons: weights left alone before any pass, with the reason.
        trace: what the passes did; None while unknown, as when a compile cache had the result.
        retrace: runs the passes again, without caches and code generation; None from it where nothing that the
            graph returns needs gradients.
        syncs: what averages gradients of the graph over ranks.
    """

    names: Mapping[int, str]
    groups: tuple[WeightGroup, ...]
    lifted: tuple[LiftedWeight, ...]
    reasons: Mapping[int, str]
    trace: Trace | None = None
    retrace: Callable[[], Trace | None] | None = field(default=None, repr=False)
    syncs: WeakSet[GradientSync] = field(default_factory=WeakSet, repr=False)


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
        on_use: called with each subspace that a call of the graph takes, and the names of its weights.
    """
    try:
        record, lifted_gm, runtime_inputs = _prepare(gm, example_inputs, settings)
        if lifted_gm is not None:
            if is_aot_compile():
                raise Refused(_AOT_COMPILE)
            return _lower_lifted(
                lifted_gm, example_inputs, runtime_inputs, record, settings, options, inner_compile, on_use
            )
        return compile_plainly(gm, example_inputs, settings, options, inner_compile), record
    except (Refused, *RESTARTS):
        raise
    except Exception as error:
        # Also what torch finds wrong with a graph that has our inputs. What it finds wrong with the graph as it came is
        # raised once more by this call, as stock torch would.
        compiled = compile_alone(gm, example_inputs, settings, options, inner_compile)
        survive(error, STAYS_DENSE, stacklevel=3)
        return compiled, CompiledGraph({}, (), (), {})


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
    runtime_inputs: Sequence[torch.Tensor],
    record: CompiledGraph,
    settings: Settings,
    options: Mapping[str, Any],
    inner_compile: Compiled | None,
    on_use: OnUse | None,
) -> tuple[Compiled, CompiledGraph]:
    """Compile a graph with the runtime's inputs, and complete its record."""
    inputs = [*example_inputs, *runtime_inputs]
    compiled, record.trace = _compile(lifted_gm, inputs, record.lifted, settings, options, inner_compile)
    fakes = [known_fake(given) for given in inputs]  # what is kept must not keep the user's tensors
    record.retrace = lambda: _retrace(lifted_gm, fakes, record.lifted, settings, options)
    names = [tuple(record.names[index] for index in group.weights) for group in record.groups]
    run = call_with_runtime_inputs(
        compiled, record.groups, names, example_inputs, runtime_inputs, settings.stats, on_use, record.syncs
    )
    return run, record


def _prepare(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> tuple[CompiledGraph, fx.GraphModule | None, list[torch.Tensor]]:
    """Choose groups and lift the runtime's inputs; no graph where there is nothing to lift."""
    gm = inline_regions(gm)
    groups, reasons, names = choose_groups(gm, example_inputs, settings)
    record = CompiledGraph(names, groups, lifted_weights(groups, len(example_inputs), settings.stats), reasons)
    if not groups:
        return record, None, []
    tensors, labels = fake_runtime_inputs(groups, example_inputs, settings.stats)
    return record, lift_runtime_inputs(gm, tensors, labels), tensors


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
    with observe_traces(traces.append), caches_may_be_left_out():
        if settings.inner == "aot_eager":
            compiled = aot_eager_lowering(gm, inputs, _EagerPartition(lifted, settings.budget))
        else:
            patches = {**options, "custom_partitioner_fn": JointPartitioner(lifted, settings.budget)}
            compiled = inductor_lowering(gm, inputs, patches, inner_compile)
    return compiled, traces[0] if traces else None


def _retrace(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    lifted: tuple[LiftedWeight, ...],
    settings: Settings,
    options: Mapping[str, Any],
) -> Trace | None:
    """Run the passes over a lifted graph again, on the fake values of its inputs."""
    with compile_caches_disabled(), torch.enable_grad():
        _, trace = _compile(gm, inputs, lifted, settings, options, run_node_by_node)
    return trace


def run_node_by_node(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
    """In place of Inductor's code generation."""
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
    with caches_may_be_left_out():  # the partitioner of ours may fail
        if settings.inner == "aot_eager":
            return aot_eager_lowering(gm, example_inputs, _EagerPartition((), settings.budget) if ours else None)
        patches = dict(options)
        if ours:
            patches["custom_partitioner_fn"] = JointPartitioner((), settings.budget)
        return inductor_lowering(gm, example_inputs, patches, inner_compile)


@dataclass(frozen=True)
class _EagerPartition:
    lifted: tuple[LiftedWeight, ...]
    budget: int | float | None

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        return partition_joint(gm, joint_inputs, lifted=self.lifted, budget=self.budget, **kwargs)
