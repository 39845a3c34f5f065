"""What the runtime lends a compiled graph at each call: bases, what else its rule asks for, and coordinate slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import fx

from oasis_fx._torch.fake_tensors import FakeTensor, known_fake, tracing_fake_mode
from oasis_fx.compile.lender import Lender, OnUse
from oasis_fx.distributed.gradient_sync import GradientSync
from oasis_fx.graph.facts import DynamoFacts, LiftedWeight, ProjectionRule, WeightGroup
from oasis_fx.graph.matricization import num_features, num_rows
from oasis_fx.graph.runtime_inputs import RuntimeInputs
from oasis_fx.runtime.gradients.in_graph import stand_in
from oasis_fx.runtime.subspaces.rules import BatchRule, StatisticRule
from oasis_fx.runtime.subspaces.state import basis_dtype

Compiled = Callable[..., Any]


def describe_runtime_inputs(
    gm: fx.GraphModule, facts: DynamoFacts, *, example_inputs: Sequence[Any], stats: bool
) -> DynamoFacts:
    """Decide which inputs a graph gets from the runtime, and make fake values of them. Changes nothing in the graph.

    Args:
        example_inputs: the graph's own inputs, real or fake.
        stats: whether the graph computes energies although no rule needs them.
    """
    if not facts.groups:
        return facts
    layout = layout_of(facts.groups, len(example_inputs), stats)
    fakes = fake_runtime_inputs(facts.groups, example_inputs, layout)
    return replace(facts, layout=layout, fakes=fakes, lifted=lifted_weights(facts.groups, layout))


def layout_of(groups: Sequence[WeightGroup], num_inputs: int, stats: bool) -> RuntimeInputs:
    """Decide which inputs the runtime lends to a graph for ``groups``, behind the ``num_inputs`` of its own."""
    spec, rule = groups[0].spec, groups[0].spec.rule  # of one backend, so of all groups
    energy = isinstance(rule, StatisticRule) and (stats or rule.needs_energy or spec.budget is not None)
    num_weights = sum(len(group.weights) for group in groups)
    has_tail = any(group.spec.tail for group in groups)
    return RuntimeInputs(num_inputs, len(groups), num_weights, energy, isinstance(rule, BatchRule), has_tail)


def lifted_weights(groups: Sequence[WeightGroup], layout: RuntimeInputs) -> tuple[LiftedWeight, ...]:
    """Return the weights of all groups, with the positions of the runtime's inputs for them."""
    rule = groups[0].spec.rule
    projection = ProjectionRule(rule.on == "gradient", isinstance(rule, StatisticRule), rule.dense)
    slots = iter(layout.positions("slot"))
    return tuple(
        LiftedWeight(
            weight=weight,
            slot=next(slots),
            basis=layout.positions("basis")[index],
            energy=layout.position("energy", index),
            features=features,
            tail=layout.position("tail", index) if group.spec.tail else None,
            control=layout.position("control", index),
            rule=projection,
        )
        for index, group in enumerate(groups)
        for weight, features in zip(group.weights, group.features, strict=True)
    )


def fake_runtime_inputs(
    groups: Sequence[WeightGroup], example_inputs: Sequence[Any], layout: RuntimeInputs
) -> dict[str, torch.Tensor]:
    """Make fake runtime inputs in the fake mode of the compile, by name and in order.

    Their sizes are those of the fake weights, symbols too, so that a graph made for weights of any size takes bases of
    any size. They have no source to guard on.
    """
    mode = tracing_fake_mode()
    assert mode is not None  # Dynamo always sets one
    bases, tails, energies, controls, slots = [], [], [], [], []
    with mode:
        for group in groups:
            for weight, features in zip(group.weights, group.features, strict=True):
                w = known_fake(example_inputs[weight])
                slot = torch.zeros(1, dtype=w.dtype, device=w.device)
                columns = group.spec.rank + group.spec.tail
                slots.append(slot.expand(num_rows(w.shape, features), columns).detach().requires_grad_())
            dtype, n = basis_dtype(w.dtype), num_features(w.shape, features)
            shape = n, group.spec.rank
            # One of a batch rule is laid out as what will come: generated code looks at the strides.
            make = stand_in if layout.has_control else torch.empty
            bases.append(make(shape, dtype=dtype, device=w.device).requires_grad_())
            tails.append(torch.empty(n, group.spec.tail, dtype=dtype, device=w.device))
            energies.append(torch.zeros((), dtype=dtype, device=w.device).requires_grad_())
            controls.append(torch.zeros(3, dtype=torch.int64, device="cpu"))
    fakes = layout.in_order(basis=bases, tail=tails, energy=energies, control=controls, slot=slots)
    return dict(zip(layout.names().values(), fakes, strict=True))


def call_with_runtime_inputs(
    compiled: Compiled,
    facts: DynamoFacts,
    example_inputs: Sequence[Any],
    on_use: OnUse | None,
    syncs: WeakSet[GradientSync],
) -> Compiled:
    """Call ``compiled`` with the bases and slots of the parameters of *each call*.

    One compiled graph serves other layers and other models with the same code: what was seen at compile
    time must not be remembered here.

    Args:
        facts: of the graph, with at least one group.
        example_inputs: the graph's own inputs at the time of the compile.
        on_use: called with each subspace that the graph takes, and the names of its weights.
        syncs: gets what averages gradients of this graph over ranks.
    """
    fakes = tuple(facts.fakes.values())
    split = any(isinstance(example_inputs[i], FakeTensor) for group in facts.groups for i in group.weights)
    static = all(isinstance(size, int) for fake in fakes for size in fake.shape)
    lender = Lender(facts, split=split, static=static, on_use=on_use, syncs=syncs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(*args: Any) -> Any:
        if split and any(isinstance(given, FakeTensor) for given in args):
            return compiled(*args, *fakes)  # DDP's graph splitting tries its parts while it compiles
        return compiled(*args, *lender(args))

    return run
