"""From a graph of Dynamo to compiled code that calls the runtime: what happens on every compile, warm or cold."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import fx

from oasis_fx.config import Settings
from oasis_fx.errors import OasisWarning
from oasis_fx.graph import LiftedWeight, value
from oasis_fx.names import weight_name
from oasis_fx.partitioner import JointPartitioner
from oasis_fx.passes.group_by_activation import WeightUse, group_by_activation
from oasis_fx.passes.lift_runtime_inputs import lift_runtime_inputs
from oasis_fx.pipeline import Trace, observe_traces, partition_joint
from oasis_fx.runtime.in_graph import control_of, stand_in
from oasis_fx.runtime.layout import num_features, num_rows, smaller_side
from oasis_fx.runtime.rules import BatchRule, StatisticRule
from oasis_fx.runtime.slots import coordinate_slots
from oasis_fx.runtime.store import STORE
from oasis_fx.runtime.subspace import Subspace, SubspaceSpec, Versions
from oasis_fx.torch_private import (
    FakeTensor,
    active_ddp,
    aot_eager_lowering,
    compile_caches_disabled,
    inductor_lowering,
    is_traceable_wrapper_subclass,
    known_fake,
    tracing_fake_mode,
)

Compiled = Callable[..., Any]
OnUse = Callable[[Subspace, tuple[str, ...]], Any]


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one graph that share a basis, by position among the graph's inputs."""

    weights: tuple[int, ...]
    features: tuple[tuple[int, int], ...]
    spec: SubspaceSpec


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
    """

    names: Mapping[int, str]
    groups: tuple[WeightGroup, ...]
    lifted: tuple[LiftedWeight, ...]
    reasons: Mapping[int, str]
    trace: Trace | None = None
    retrace: Callable[[], Trace | None] | None = field(default=None, repr=False)


def choose_groups(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> tuple[tuple[WeightGroup, ...], dict[int, str], dict[int, str]]:
    """Decide which weights of a graph get a basis, and which share one.

    Returns:
        The groups, the reasons for the weights left alone, and all parameter names, both by position.
    """
    position = {node: index for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    weights = _weights(gm, example_inputs)
    names = {position[node]: weight_name(node) for node in weights}
    reasons: dict[int, str] = {}
    for node in weights:
        if not example_inputs[position[node]].requires_grad:
            reasons[position[node]] = "frozen"
        elif is_traceable_wrapper_subclass(example_inputs[position[node]]):
            reasons[position[node]] = f"it is a {type(example_inputs[position[node]]).__name__}"
        elif not value(node).is_floating_point() or value(node).layout != torch.strided:
            reasons[position[node]] = f"its dtype is {value(node).dtype}"
        elif _is_looked_up(node) and settings.exclude is None:
            reasons[position[node]] = "embedding, or tied to one, excluded by default"
        elif (reason := settings.reason_to_skip(names[position[node]])) is not None:
            reasons[position[node]] = reason
    eligible = [node for node in weights if position[node] not in reasons]
    uses, missed = group_by_activation(gm, eligible)
    reasons |= {position[node]: reason for node, reason in missed.items()}
    groups = [group for members in uses for group in _split(members, position, names, example_inputs, settings)]
    return tuple(groups), reasons, names


def parameter_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """Names of the weights of a graph: its parameters of at least two dimensions."""
    return [weight_name(node) for node in _weights(gm, example_inputs)]


def _weights(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[fx.Node]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [
        node
        for node, given in zip(placeholders, example_inputs, strict=True)
        if isinstance(given, torch.nn.Parameter) and given.dim() >= 2
    ]


def _is_looked_up(node: fx.Node) -> bool:
    return any(user.target is torch.nn.functional.embedding for user in node.users)


def _split(
    members: Sequence[WeightUse],
    position: Mapping[fx.Node, int],
    names: Mapping[int, str],
    example_inputs: Sequence[Any],
    settings: Settings,
) -> list[WeightGroup]:
    """Part a group where its weights want different ranks, or already have different bases."""
    parts: dict[Any, list[WeightUse]] = {}
    of_gradient = settings.rule.on == "gradient"
    for use in members:
        index = position[use.weight]
        weight = example_inputs[index]
        if of_gradient:
            use = replace(use, features=smaller_side(weight.shape, use.features))
        n = num_features(weight.shape, use.features)
        rank = settings.rank_of(names[index], n)
        assert rank is not None  # a weight that no glob of rank names was left alone before
        spec = SubspaceSpec(
            rank=rank,
            rule=settings.rule,
            learning_rate=settings.subspace_lr,  # type: ignore[arg-type]
            every=settings.subspace_every,  # type: ignore[arg-type]
            budget=settings.share,
        )
        # Under DDP the example inputs are fake: what the real weights have is seen at run time alone.
        present = None
        if not isinstance(weight, FakeTensor):
            spec = STORE.current_spec(weight, spec)
            present = STORE.existing(weight, spec)
        alone = index if of_gradient else None  # each gradient has a basis of its own
        parts.setdefault((spec, n, weight.dtype, weight.device, id(present), alone), []).append(use)
    return [
        WeightGroup(tuple(position[use.weight] for use in uses), tuple(use.features for use in uses), spec)
        for (spec, *_), uses in parts.items()
    ]


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
    record, lifted_gm, runtime_inputs = _prepare(gm, example_inputs, settings)
    if lifted_gm is None:
        return compile_plainly(gm, example_inputs, settings, options, inner_compile), record
    inputs = [*example_inputs, *runtime_inputs]
    compiled, record.trace = _compile(lifted_gm, inputs, record.lifted, settings, options, inner_compile)
    fakes = [known_fake(given) for given in inputs]  # what is kept must not keep the user's tensors
    record.retrace = lambda: _retrace(lifted_gm, fakes, record.lifted, settings, options)
    return _call_with_runtime_inputs(compiled, record, example_inputs, runtime_inputs, settings.stats, on_use), record


def _prepare(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> tuple[CompiledGraph, fx.GraphModule | None, list[torch.Tensor]]:
    """Choose groups and lift the runtime's inputs; no graph where there is nothing to lift.

    All that relies on Dynamo's private side is in here: what surprises us there leaves the graph as it is.
    """
    try:
        groups, reasons, names = choose_groups(gm, example_inputs, settings)
        record = CompiledGraph(names, groups, _lifted(groups, len(example_inputs), settings.stats), reasons)
        if not groups:
            return record, None, []
        tensors, labels = _fake_runtime_inputs(groups, example_inputs, settings.stats)
        return record, lift_runtime_inputs(gm, tensors, labels), tensors
    except (AttributeError, AssertionError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        warnings.warn(f"gradients of a graph stay dense: torch surprised oasis_fx ({why})", OasisWarning, stacklevel=3)
        return CompiledGraph({}, (), (), {}), None, []


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
    with observe_traces(traces.append):
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
    """Compile a graph as the inner compiler alone would."""
    if settings.inner == "aot_eager":
        partition = None if settings.budget is None else _EagerPartition((), settings.budget)
        return aot_eager_lowering(gm, example_inputs, partition)
    patches = dict(options)
    if settings.budget is not None:
        patches["custom_partitioner_fn"] = JointPartitioner((), settings.budget)
    return inductor_lowering(gm, example_inputs, patches, inner_compile)


@dataclass(frozen=True)
class _EagerPartition:
    lifted: tuple[LiftedWeight, ...]
    budget: int | float | None

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        return partition_joint(gm, joint_inputs, lifted=self.lifted, budget=self.budget, **kwargs)


@dataclass(frozen=True)
class _Lending:
    """Which of the runtime's inputs a rule wants: a basis for each group, then what else it names, then all slots."""

    energy: bool
    control: bool


def _lending(groups: Sequence[WeightGroup], stats: bool) -> _Lending:
    spec, rule = groups[0].spec, groups[0].spec.rule  # of one backend, so of all groups
    energy = isinstance(rule, StatisticRule) and (stats or rule.needs_energy or spec.budget is not None)
    return _Lending(energy, isinstance(rule, BatchRule))


def _lifted(groups: Sequence[WeightGroup], num_inputs: int, stats: bool) -> tuple[LiftedWeight, ...]:
    """Positions of the runtime's inputs, behind the graph's own."""
    if not groups:
        return ()
    lending, rule, count = _lending(groups, stats), groups[0].spec.rule, len(groups)
    control = num_inputs + count * (1 + lending.energy)
    slot = control + count * lending.control
    lifted = []
    for index, group in enumerate(groups):
        for weight, features in zip(group.weights, group.features, strict=True):
            made = LiftedWeight(
                weight,
                slot,
                num_inputs + index,
                num_inputs + count + index if lending.energy else None,
                features,
                of_gradient=rule.on == "gradient",
                statistic=isinstance(rule, StatisticRule),
                control=control + index if lending.control else None,
                dense=rule.dense,
            )
            lifted.append(made)
            slot += 1
    return tuple(lifted)


def _fake_runtime_inputs(
    groups: Sequence[WeightGroup], example_inputs: Sequence[Any], stats: bool
) -> tuple[list[torch.Tensor], list[str]]:
    """Fake runtime inputs in the fake mode of the compile, with static shapes: they have no source to guard on."""
    mode = tracing_fake_mode()
    assert mode is not None  # Dynamo always sets one
    lending = _lending(groups, stats)
    bases, energies, controls, slots = [], [], [], []
    for group in groups:
        for weight, features in zip(group.weights, group.features, strict=True):
            w = example_inputs[weight]
            slot = torch.zeros(1, dtype=w.dtype, device=w.device).expand(num_rows(w.shape, features), group.spec.rank)
            slots.append(slot.detach().requires_grad_())
        dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
        n = num_features(w.shape, features)
        shape = n, group.spec.rank
        basis = torch.empty(shape, dtype=dtype, device=w.device)
        if lending.control:  # laid out as what will come: generated code looks at the strides
            basis = stand_in(shape, dtype, w.device)
        bases.append(basis.requires_grad_())
        if lending.energy:
            energies.append(torch.zeros((), dtype=dtype, device=w.device).requires_grad_())
        if lending.control:
            controls.append(torch.zeros(3, dtype=torch.int64, device="cpu"))
    inputs = {"basis": bases, "energy": energies, "control": controls, "slot": slots}
    names = [f"{kind}_{index}" for kind, made in inputs.items() for index in range(len(made))]
    made = [*bases, *energies, *controls, *slots]
    fakes: list[torch.Tensor] = [mode.from_tensor(t, static_shapes=True) for t in made]
    return fakes, names


def _check_distributed(members: Sequence[torch.Tensor], group: WeightGroup, ddp: Any) -> None:
    """Refuse what would go wrong silently: gradients that nobody averages, ranks that the graph has not seen."""
    if ddp is not None and not all(getattr(weight, "_oasis_synchronized", False) for weight in members):
        raise RuntimeError(
            "the model runs under DistributedDataParallel, which cannot average low-rank gradients: call "
            "oasis_fx.distributed.synchronize(model) before it is wrapped"
        )
    if STORE.current_spec(members[0], group.spec) != group.spec:
        raise RuntimeError(
            "a rank has changed, and DDP's graph splitting hides the weights from their graphs: set "
            "torch._dynamo.config.optimize_ddp = False"
        )


def _call_with_runtime_inputs(
    compiled: Compiled,
    record: CompiledGraph,
    example_inputs: Sequence[Any],
    runtime_inputs: Sequence[torch.Tensor],
    stats: bool,
    on_use: OnUse | None,
) -> Compiled:
    """Call ``compiled`` with the bases and slots of the parameters of *each call*.

    One compiled graph serves other layers and other models with the same code: what was seen at compile
    time must not be remembered here.
    """
    groups = record.groups
    lending = _lending(groups, stats)
    names = [tuple(record.names[index] for index in group.weights) for group in groups]
    features = tuple(dims for group in groups for dims in group.features)
    split = any(isinstance(example_inputs[i], FakeTensor) for group in groups for i in group.weights)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(*args: Any) -> Any:
        if split and any(isinstance(given, FakeTensor) for given in args):
            return compiled(*args, *runtime_inputs)  # DDP's graph splitting tries its parts while it compiles
        subspaces, weights, owners = [], [], []
        ddp = active_ddp()
        for group in groups:
            members = [args[index] for index in group.weights]
            if split or ddp is not None:
                _check_distributed(members, group, ddp)
            subspace = STORE.resolve(members, group.spec, group.features)
            subspaces.append(subspace)
            weights += members
            owners += [subspace] * len(members)
        versions = Versions() if lending.control else None
        slots = coordinate_slots(weights, owners, features, versions)
        if on_use is not None:
            for subspace, known_as in zip(subspaces, names, strict=True):
                on_use(subspace, known_as)
        if versions is not None:
            bases = [stand_in(subspace.shape, subspace.dtype, subspace.device) for subspace in subspaces]
            others = [control_of(subspace, versions) for subspace in subspaces]
        else:
            bases = [subspace.basis for subspace in subspaces]
            others = [subspace.energy for subspace in subspaces] if lending.energy else []
        return compiled(*args, *bases, *others, *slots)

    return run
