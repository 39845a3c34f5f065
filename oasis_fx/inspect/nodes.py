"""What a reader wants to know of a node: its size, the module and the line it is from, what the passes did to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import takewhile

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import gradient_positions, input_placeholders, is_tangent
from oasis_fx.compile.joint import Trace
from oasis_fx.compile.names import without_root, without_wrappers
from oasis_fx.graph.edits import aten, outputs, prims, value
from oasis_fx.graph.facts import LiftedWeight
from oasis_fx.graph.runtime_inputs import RuntimeInputs
from oasis_fx.memory.node_costs import value_bytes

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')
# What computes P from X and Q, and what Q goes through before.
_PROJECTIONS = (aten.mm.default, aten.bmm.default, aten.convolution.default)
_MADE_OF_ITS_FIRST_INPUT = (
    aten.cat.default,  # [Q, T]
    prims.convert_element_type.default,
    aten.view.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.expand.default,
)
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class NodeFacts:
    """What a reader wants to know of one node of a graph.

    Attributes:
        part: ``"forward"``, ``"backward"``, or ``"both"`` where the backward pass recomputes it; of an input what it
            is: ``"weight"``, one of `RUNTIME_INPUTS`, ``"parameter or buffer"`` for others of
            the module, ``"incoming gradient"`` or ``"input"``.
        num_bytes: of its elements; a view has them without memory of its own.
        saved: the forward pass hands it to the backward pass.
        mark: ``"+P"``, ``"+C"``, ``"+E"`` (the energy, ||X||^2) or ``"+G"`` for the node that has such a value, ``"+"``
            for others that the passes added, ``"-"`` for those that they removed, else empty.
        weights: names of the weights that it stands for (inputs), or whose gradient it was added or removed for.
        module: path of the innermost module that it is from, for backward nodes that of the forward; may be empty.
        line: the user's innermost line, ``file.py:12 code``; empty where Dynamo kept none (modules of torch alone).
    """

    part: str
    num_bytes: int
    saved: bool
    mark: str
    weights: tuple[str, ...]
    module: str
    line: str

    def belongs_to(self, pattern: str) -> bool:
        """Tell whether its module, or one of its weights, is or lies in what ``pattern`` names, as in `within`."""
        return any(within(name, pattern) for name in (self.module, *self.weights) if name)


def within(name: str, pattern: str) -> bool:
    """Tell whether a dotted name is, or lies in, what a glob names; the glob may leave out the front of the path.

    ``layers.3`` names ``model.layers.3.mlp``, and not ``model.layers.30``.
    """
    return any(fnmatchcase(name, f"{front}{pattern}{back}") for front in ("", "*.") for back in ("", ".*"))


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the innermost module that a node is from; empty where torch kept none."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = without_root(str(list(stack.values())[-1][0])).lstrip(".")
    return without_wrappers(path.partition("@")[0])  # "@1": the module's second call


def source_line(node: fx.Node) -> str:
    """Return the user's innermost line that a node is from, as ``file.py:12 code``; empty where there is none."""
    if node.meta.get("is_gradient_acc"):
        return ""  # autograd's own sum: it bears the trace of whatever ran last
    frames = [frame for frame in _FRAME.findall(node.meta.get("stack_trace") or "") if not frame[0].startswith(_TORCH)]
    return f"{os.path.basename(frames[-1][0])}:{frames[-1][1]} {frames[-1][2].strip()}" if frames else ""


def _modules(joint: fx.Graph, known: Mapping[str, str]) -> dict[str, str]:
    """Module paths by node name: those that are known, and those that torch kept.

    Autograd's sums of gradients have none: one belongs where the backward pass goes on with it, other sums aside.
    """
    modules: dict[str, str] = {}
    for node in reversed(joint.nodes):
        if node.meta.get("is_gradient_acc"):
            readers = [user for user in node.users if user.op != "output"]
            readers = [user for user in readers if not user.meta.get("is_gradient_acc")] or readers
            paths = [modules[user.name].split(".") for user in readers]
            shared = takewhile(lambda steps: len(set(steps)) == 1, zip(*paths, strict=False))
            modules[node.name] = ".".join(steps[0] for steps in shared)
        else:
            modules[node.name] = known[node.name] if node.name in known else module_path(node)
    return modules


def joint_facts(
    joint: fx.Graph,
    partition: tuple[fx.Graph, fx.Graph],
    num_forward_outputs: int,
    marks: Mapping[str, str],
    weights: Mapping[str, tuple[str, ...]],
    kinds: Mapping[str, str],
) -> dict[str, NodeFacts]:
    """Collect facts by node name, for a joint graph and its two halves.

    Args:
        num_forward_outputs: how many of the joint graph's outputs the user's forward pass returns.
        marks, weights: by node name, from `marks_and_weights`.
        kinds: what inputs are, by node name, from `input_kinds`.
    """
    forward, backward = ({node.name for node in graph.nodes if node.op == "call_function"} for graph in partition)
    kept = outputs(partition[0])[num_forward_outputs:]
    saved = {node.name for node in kept if isinstance(node, fx.Node)}
    # What the passes add stands next to an X that another module may have made, and bears that one's line.
    added = {name: weights[name][0].rpartition(".")[0] for name in weights if marks.get(name, "").startswith("+")}
    modules = _modules(joint, added)
    facts: dict[str, NodeFacts] = {}
    for node in (node for graph in (joint, *partition) for node in graph.nodes):
        if node.name in facts or node.op == "output":
            continue
        name, mark, of = node.name, marks.get(node.name, ""), weights.get(node.name, ())
        part = "both" if name in forward & backward else "forward" if name in forward else "backward"
        facts[name] = NodeFacts(
            part=part if node.op == "call_function" else kinds.get(name, "input"),
            num_bytes=value_bytes(value(node)),
            saved=name in saved,
            mark=mark,
            weights=of,
            module=modules.get(name, ""),
            line="" if name in added and module_path(node) not in ("", added[name]) else source_line(node),
        )
    return facts


def marks_and_weights(
    trace: Trace, names: Mapping[int, str], lifted: Sequence[LiftedWeight]
) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Find what the passes added and removed, and the weights that nodes are about, both by node name."""
    known = [{node.name for node in gm.graph.nodes} for gm in (trace.before, trace.after)]
    marks = dict.fromkeys(known[0] - known[1], "-") | dict.fromkeys(known[1] - known[0], "+")
    placeholders = {at: node.name for at, node in input_placeholders(trace.after.graph).items()}
    about: dict[str, list[str]] = {placeholders[at]: [name] for at, name in names.items() if at in placeholders}
    for weight in lifted:
        for position in weight.runtime_inputs:
            about.setdefault(placeholders[position], []).append(names[weight.weight])
    dense, low_rank = _gradients(trace.before.graph), _gradients(trace.after.graph)
    for site in trace.sites:
        weight = site.inputs
        roots = {"": dense.get(weight.weight), "+G": low_rank.get(weight.slot), "+C": low_rank.get(weight.basis)}
        if weight.energy is not None:
            roots["+E"] = low_rank.get(weight.energy)
        for mark, root in roots.items():
            for node in _marked_inputs(root, marks):
                about.setdefault(node.name, []).append(names[weight.weight])
                if node.target in _PROJECTIONS and _is_basis(node.args[1], placeholders[weight.basis]):
                    marks[node.name] = "+P"
            if mark and root is not None:
                marks[root.name] = mark
    return marks, {name: tuple(dict.fromkeys(of)) for name, of in about.items()}


def input_kinds(trace: Trace, names: Mapping[int, str], layout: RuntimeInputs | None) -> dict[str, str]:
    """Tell what each input is, by node name, where it is more than an input."""
    inputs = list(trace.after.graph.find_nodes(op="placeholder"))
    placeholders = input_placeholders(trace.after.graph)
    kinds = {inputs[position].name: "parameter or buffer" for position in trace.static_inputs}
    kinds |= {node.name: "incoming gradient" for node in inputs if is_tangent(node)}
    kinds |= {placeholders[position].name: "weight" for position in names if position in placeholders}
    return kinds | {placeholders[at].name: kind for at, kind in (layout.kinds() if layout else {}).items()}


def _gradients(joint: fx.Graph) -> dict[int, fx.Node]:
    """The gradients that a joint graph returns, by the position of the input."""
    values, positions = outputs(joint), gradient_positions(joint)
    return {input_: values[output] for input_, output in positions.items() if isinstance(values[output], fx.Node)}


def _marked_inputs(root: fx.Node | None, marks: Mapping[str, str]) -> Iterator[fx.Node]:
    """``root`` and what it is computed from, as far as the passes added or removed it."""
    pending = [root] if root is not None else []
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name not in marks:
            continue
        yield node
        pending += [source for source in node.all_input_nodes if source not in seen]
        seen.update(node.all_input_nodes)


def _is_basis(given: object, basis: str) -> bool:
    while isinstance(given, fx.Node) and given.target in _MADE_OF_ITS_FIRST_INPUT:
        given = given.all_input_nodes[0]
    return isinstance(given, fx.Node) and given.name == basis


def first_backward_node(joint: fx.Graph) -> fx.Node | None:
    """Find where the backward half of a joint graph begins: the first node that reads an incoming gradient."""
    reads = (node for node in joint.nodes if any(map(_from_outside, node.all_input_nodes)) and node.op != "output")
    return next(reads, None)


def _from_outside(node: fx.Node) -> bool:
    return node.op == "placeholder" and is_tangent(node)


def select(nodes: Iterable[fx.Node], facts: Mapping[str, NodeFacts], pattern: str | None) -> list[fx.Node]:
    """Return the nodes that belong to ``pattern``; all of them for None; the output node never."""
    return [
        node
        for node in nodes
        if node.op != "output" and (pattern is None or (node.name in facts and facts[node.name].belongs_to(pattern)))
    ]
