"""Which weights of a graph get a basis, and which share one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from oasis_fx._torch.fake_tensors import FakeTensor, is_traceable_wrapper_subclass, known_fake
from oasis_fx.compile.names import weight_name
from oasis_fx.graph.edits import value
from oasis_fx.graph.facts import DynamoFacts, WeightGroup
from oasis_fx.graph.matricization import num_features, smaller_side
from oasis_fx.passes.group_by_activation import WeightUse, group_by_activation
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE
from oasis_fx.settings import Settings


def choose_groups(
    gm: fx.GraphModule, facts: DynamoFacts, *, example_inputs: Sequence[Any], settings: Settings
) -> DynamoFacts:
    """Decide which weights of a graph of Dynamo get a basis, and which share one. Changes nothing in the graph.

    Args:
        example_inputs: the graph's inputs, real or fake.

    Returns:
        The facts with all parameter names, the groups, and the reasons for the weights left alone.
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
        elif not value(node).numel():
            reasons[position[node]] = f"it has no elements: its shape is {list(value(node).shape)}"
        elif _is_looked_up(node) and settings.exclude is None:
            reasons[position[node]] = "embedding, or tied to one, excluded by default"
        elif (reason := settings.reason_to_skip(names[position[node]])) is not None:
            reasons[position[node]] = reason
    eligible = [node for node in weights if position[node] not in reasons]
    uses, missed = group_by_activation(gm, eligible)
    reasons |= {position[node]: reason for node, reason in missed.items()}
    of_gradient = settings.rule.on == "gradient"
    based = [_as_based(members, position, example_inputs, of_gradient, reasons) for members in uses]
    groups = [group for members in based for group in _split(members, position, names, example_inputs, settings)]
    return replace(facts, names=names, groups=tuple(groups), reasons=reasons)


def _as_based(
    members: Sequence[WeightUse],
    position: Mapping[fx.Node, int],
    example_inputs: Sequence[Any],
    of_gradient: bool,
    reasons: dict[int, str],
) -> list[WeightUse]:
    """The uses of a group over the dimensions that their bases have; leaves out weights that another graph reads the
    other way round, with the reason: factors in two kinds of coordinates cannot be added.
    """
    kept = []
    for use in members:
        weight = example_inputs[position[use.weight]]
        if of_gradient:
            use = replace(use, features=smaller_side(known_fake(weight).shape, use.features))
        known = () if isinstance(weight, FakeTensor) else STORE.read_over(weight)
        if known and use.features not in known:
            reasons[position[use.weight]] = "another graph reads it over its other dimension"
        else:
            kept.append(use)
    return kept


def parameter_names(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[str]:
    """Return the names of a graph's weights: its parameters of at least two dimensions."""
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
        n = num_features(known_fake(weight).shape, use.features)
        rank = settings.rank_of(names[index], n)
        assert rank is not None  # a weight that no glob of rank names was left alone before
        spec = SubspaceSpec(
            rank=int(rank),  # where n is a symbol that decides it, torch guards on its value
            rule=settings.rule,
            budget=settings.share,
            tail=int(settings.tail_of(n, rank)),
        )
        # Under DDP the example inputs are fake: what the real weights have is seen at run time alone.
        present: object = None
        if not isinstance(weight, FakeTensor):
            spec = STORE.current_spec(weight, spec)
            present = STORE.existing(weight, spec)
            waiting = STORE.waiting(weight)
            if present is None and waiting is not None:  # a resumed run parts them as the one that saved them did
                present = waiting.group
        alone = index if of_gradient else None  # each gradient has a basis of its own
        parts.setdefault((spec, str(n), weight.dtype, weight.device, present, alone), []).append(use)
    return [
        WeightGroup(tuple(position[use.weight] for use in uses), tuple(use.features for use in uses), spec)
        for (spec, *_), uses in parts.items()
    ]
