"""Find, on Dynamo's graph, the weights that a matmul reads, and which of them read one activation.

    q = linear(x, wq)                        {wq, wk, wv}   read x   -> one basis
    k = linear(x.view(-1, n), wk)     -->
    v = x @ wv                               {wo}           reads a  -> one basis
    y = linear(a, wo)

This decides what the runtime lends to a graph, on every compile, warm or cold. It need not be exact: whether
a weight's gradient is rewritten is decided on the joint graph, by what its nodes compute.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from oasis_fx.graph.edits import shape
from oasis_fx.passes.matchers.follow_weights import behind_reshapes, operation, stored_weight
from oasis_fx.passes.matchers.read_decomposed import decomposed_matmuls
from oasis_fx.passes.matchers.read_matmuls import matmuls

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class WeightUse:
    """A parameter that matmuls of the graph read.

    Attributes:
        weight: its placeholder.
        features: its dimensions that the matmuls sum over, from and to.
        activations: the nodes that its matmuls read, behind reshapes.
    """

    weight: fx.Node
    features: tuple[int, int]
    activations: tuple[fx.Node, ...]


def group_by_activation(
    gm: fx.GraphModule, weights: Sequence[fx.Node]
) -> tuple[tuple[tuple[WeightUse, ...], ...], Mapping[fx.Node, str]]:
    """Return groups of weights that share an activation, and the reason for each weight left out.

    Args:
        gm: the graph of Dynamo; not changed.
        weights: placeholders of the trainable parameters to look at.
    """
    uses: dict[fx.Node, list[tuple[tuple[int, ...], fx.Node]]] = {}
    for activation, weight, summed in _matmuls(gm, set(weights), {}):
        uses.setdefault(weight, []).append((summed, activation))
    found: list[WeightUse] = []
    reasons: dict[fx.Node, str] = {}
    for weight in weights:
        sums = {summed for summed, _ in uses.get(weight, ())}
        if not sums:
            reasons[weight] = f"no matmul of this graph reads it directly, only {_readers(weight)}"
        elif len(sums) > 1:
            reasons[weight] = "matmuls sum over different dimensions of it"
        else:
            (summed,) = sums
            if summed != tuple(range(summed[0], summed[-1] + 1)) or len(summed) == len(shape(weight)):
                reasons[weight] = f"a matmul sums over its dimensions {summed}"
                continue
            activations = tuple(dict.fromkeys(activation for _, activation in uses[weight]))
            found.append(WeightUse(weight, (summed[0], summed[-1] + 1), activations))
    return _connected(found), reasons


def _readers(weight: fx.Node) -> str:
    names = [operation(user) or str(user.target) for user in weight.users]
    # A convolution that is a matmul would have been found.
    return ", ".join(dict.fromkeys(f"{n} with groups" if n in _CONVOLUTIONS else n for n in names)) or "nothing"


def _connected(uses: Sequence[WeightUse]) -> tuple[tuple[WeightUse, ...], ...]:
    """Merge uses that share an activation, directly or through others; keep the graph's order."""
    groups: list[tuple[set[fx.Node], list[WeightUse]]] = []
    for use in uses:
        joined = [group for group in groups if group[0] & set(use.activations)]
        groups = [group for group in groups if group not in joined]
        activations = set(use.activations).union(*(nodes for nodes, _ in joined))
        groups.append((activations, [member for _, members in joined for member in members] + [use]))
    order = {use.weight: index for index, use in enumerate(uses)}
    members = [sorted(group, key=lambda use: order[use.weight]) for _, group in groups]
    return tuple(tuple(group) for group in sorted(members, key=lambda group: order[group[0].weight]))


def _matmuls(
    gm: fx.GraphModule, weights: Collection[fx.Node], outer: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node, tuple[int, ...]]]:
    """Yield (activation, weight placeholder, its dimensions summed over) for each matmul with one of ``weights``.

    ``outer`` maps the placeholders of a checkpointed region's body to the nodes that are passed to it.
    """
    # Of a region's placeholders, those that a weight is passed to.
    passed = {inside for inside, outside in outer.items() if stored_weight(outside)[0] in weights}
    here = passed if outer else weights
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint:
            body = getattr(gm, node.args[0].target)
            arguments = [outer.get(a, a) if isinstance(a, fx.Node) else a for a in node.args[1:]]
            inner = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=False))
            yield from _matmuls(body, weights, {k: a for k, a in inner.items() if isinstance(a, fx.Node)})
            continue
        for found in matmuls(node, here) or decomposed_matmuls(node, here):
            stored, labels = stored_weight(found.weight)
            summed = [dim for feature in found.features for dim in labels[feature]]
            if stored in outer:  # its transpose may have been taken outside the region
                stored, labels = stored_weight(outer[stored])
                summed = [d for dim in summed for d in labels[dim]]
            if len(shape(stored)) >= 2 and summed:
                source = behind_reshapes(found.activation)
                yield behind_reshapes(outer.get(source, source)), stored, tuple(sorted(summed))
