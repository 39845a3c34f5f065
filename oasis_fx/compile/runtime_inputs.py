"""What the runtime lends a compiled graph at each call: bases, what else a rule goes by, and slots for gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch.nn.parallel import DistributedDataParallel

from oasis_fx._torch.compiler import FakeTensor, active_ddp, known_fake, tracing_fake_mode
from oasis_fx.compile.groups import WeightGroup
from oasis_fx.distributed.gradient_sync import GradientSync, sync_of
from oasis_fx.graph.facts import LiftedWeight
from oasis_fx.graph.matricization import num_features, num_rows
from oasis_fx.runtime.gradients.in_graph import control_of, stand_in
from oasis_fx.runtime.gradients.slots import Group, lend
from oasis_fx.runtime.subspaces.rules import BatchRule, StatisticRule
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.runtime.subspaces.subspace import Family, Subspace, SubspaceSpec, Versions

Compiled = Callable[..., Any]
OnUse = Callable[[Subspace, tuple[str, ...]], Any]


@dataclass(frozen=True)
class _Lending:
    """Which of the runtime's inputs a rule wants: a basis for each group, then what else it names, then all slots."""

    energy: bool
    control: bool


def _lending(groups: Sequence[WeightGroup], stats: bool) -> _Lending:
    spec, rule = groups[0].spec, groups[0].spec.rule  # of one backend, so of all groups
    energy = isinstance(rule, StatisticRule) and (stats or rule.needs_energy or spec.budget is not None)
    return _Lending(energy, isinstance(rule, BatchRule))


def lifted_weights(groups: Sequence[WeightGroup], num_inputs: int, stats: bool) -> tuple[LiftedWeight, ...]:
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


def fake_runtime_inputs(
    groups: Sequence[WeightGroup], example_inputs: Sequence[Any], stats: bool
) -> tuple[list[torch.Tensor], list[str]]:
    """Fake runtime inputs in the fake mode of the compile, and their names.

    Their sizes are those of the fake weights, symbols too, so that a graph made for weights of any size takes bases of
    any size. They have no source to guard on.
    """
    mode = tracing_fake_mode()
    assert mode is not None  # Dynamo always sets one
    lending = _lending(groups, stats)
    bases, energies, controls, slots = [], [], [], []
    with mode:
        for group in groups:
            for weight, features in zip(group.weights, group.features, strict=True):
                w = known_fake(example_inputs[weight])
                slot = torch.zeros(1, dtype=w.dtype, device=w.device)
                slots.append(slot.expand(num_rows(w.shape, features), group.spec.rank).detach().requires_grad_())
            dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
            shape = num_features(w.shape, features), group.spec.rank
            # One of a batch rule is laid out as what will come: generated code looks at the strides.
            make = stand_in if lending.control else torch.empty
            bases.append(make(shape, dtype=dtype, device=w.device).requires_grad_())
            if lending.energy:
                energies.append(torch.zeros((), dtype=dtype, device=w.device).requires_grad_())
            if lending.control:
                controls.append(torch.zeros(3, dtype=torch.int64, device="cpu"))
    inputs = {"basis": bases, "energy": energies, "control": controls, "slot": slots}
    names = [f"{kind}_{index}" for kind, made in inputs.items() for index in range(len(made))]
    return [*bases, *energies, *controls, *slots], names


def _averaging(members: Sequence[torch.Tensor], ddp: DistributedDataParallel | None) -> GradientSync | None:
    """What averages the gradients of a group over ranks. Refuses those under DDP that nothing does."""
    syncs = [sync_of(weight) for weight in members]
    if ddp is not None:
        if None in syncs:
            raise RuntimeError(
                "the model runs under DistributedDataParallel, which cannot average low-rank gradients: call "
                "oasis_fx.distributed.prepare(model) before it is wrapped"
            )
        for sync in syncs:
            sync.follow(ddp)  # type: ignore[union-attr]
    return syncs[0]


def _check_rank(weight: torch.Tensor, spec: SubspaceSpec, split: bool) -> None:
    """Refuse a graph of another rank than a weight has by now."""
    if STORE.current_spec(weight, spec) == spec:
        return
    if split:
        raise RuntimeError(
            "a rank has changed, and DDP's graph splitting hides the weights from their graphs: set "
            "torch._dynamo.config.optimize_ddp = False"
        )
    raise RuntimeError(
        "layers that share a compiled graph have different ranks, from a checkpoint of a model that was compiled "
        "otherwise: compile the whole model, or load what resize_checkpoint(state_dict, rank) makes of it"
    )


def call_with_runtime_inputs(
    compiled: Compiled,
    groups: Sequence[WeightGroup],
    names: Sequence[tuple[str, ...]],
    example_inputs: Sequence[Any],
    runtime_inputs: Sequence[torch.Tensor],
    stats: bool,
    on_use: OnUse | None,
    syncs: WeakSet[GradientSync],
) -> Compiled:
    """Call ``compiled`` with the bases and slots of the parameters of *each call*.

    One compiled graph serves other layers and other models with the same code: what was seen at compile
    time must not be remembered here.

    Args:
        names: of the weights of each group, for ``on_use``.
        syncs: gets what averages gradients of this graph over ranks.
    """
    lending = _lending(groups, stats)
    split = any(isinstance(example_inputs[i], FakeTensor) for group in groups for i in group.weights)

    families = [Family() for _ in groups]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(*args: Any) -> Any:
        if split and any(isinstance(given, FakeTensor) for given in args):
            return compiled(*args, *runtime_inputs)  # DDP's graph splitting tries its parts while it compiles
        used: list[Group] = []
        ddp = active_ddp()
        for group, family, known_as in zip(groups, families, names, strict=True):
            members = tuple(args[index] for index in group.weights)
            sync = _averaging(members, ddp)
            if sync is not None:
                syncs.add(sync)
            if split or group.spec.budget is not None:
                _check_rank(members[0], group.spec, split)
            subspace = STORE.resolve(members, group.spec, group.features)
            subspace.family.join(family)
            subspace.names = subspace.names or known_as
            subspace.replicas = frozenset() if sync is None else sync.replicas
            if on_use is not None:
                on_use(subspace, known_as)
            used.append(Group(subspace, members, group.features))
        versions = Versions() if lending.control else None
        lent = lend(used, versions)
        if versions is not None:
            bases = [stand_in(group.subspace.shape, group.subspace.dtype, group.subspace.device) for group in used]
            others = [control_of(group.subspace, versions) for group in used]
            return compiled(*args, *bases, *others, *lent.slots)
        return compiled(*args, *lent.bases, *(lent.energies if lending.energy else ()), *lent.slots)

    return run
