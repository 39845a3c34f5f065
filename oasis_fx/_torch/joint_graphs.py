"""What AOTAutograd says of a joint graph: what inputs and outputs are, which nodes write, and in which pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    SavedForBackwardsAOTOutput,
    TangentAOTInput,
)

__all__ = [
    "SavedForBackwardsAOTOutput",
    "changed_inputs",
    "gradient_positions",
    "input_placeholders",
    "is_backward_write",
    "is_tangent",
    "is_whole_joint",
    "is_write",
    "output_descriptors",
    "set_output_descriptors",
    "traced_in_backward",
]

_OF_FORWARD = ("is_forward", "must_be_in_forward")
_SET = torch.ops.aten.set_.source_Tensor  # gives an input other memory, and leaves what it had


def is_whole_joint(joint: fx.Graph) -> bool:
    """True for the joint graph of a compile, whose inputs and outputs are described; False for a body within one."""
    return "desc" in joint.output_node().meta


def gradient_positions(joint: fx.Graph) -> dict[int, int]:
    """Map the position of each graph input to the position of its gradient in the joint graph's outputs."""
    output = joint.output_node()
    descriptors: Sequence[Any] = output.meta["desc"]
    positions: dict[int, int] = {}
    for position, descriptor in enumerate(descriptors):
        if isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput):
            positions[descriptor.grad_of.idx] = position
    return positions


def input_placeholders(joint: fx.Graph) -> dict[int, fx.Node]:
    """Map the position of each graph input to its placeholder.

    A tensor subclass among the inputs (a quantised weight) stands in the joint graph as its inner tensors, so the
    n-th input need not be the n-th placeholder; the subclass itself has none.
    """
    described = ((node.meta.get("desc"), node) for node in joint.find_nodes(op="placeholder"))
    return {desc.idx: node for desc, node in described if isinstance(desc, PlainAOTInput)}


def output_descriptors(output: fx.Node) -> list[Any]:
    """What AOTAutograd notes of each output of a graph, in their order; nothing where it has lost it."""
    return list(output.meta.get("desc", ()))


def set_output_descriptors(output: fx.Node, descriptors: Sequence[Any]) -> None:
    """Note what each output of a graph is."""
    output.meta["desc"] = list(descriptors)


def is_tangent(placeholder: fx.Node) -> bool:
    """True for an incoming gradient of the joint graph."""
    return isinstance(placeholder.meta.get("desc"), TangentAOTInput)


def traced_in_backward(joint: fx.Graph) -> set[fx.Node]:
    """Nodes of a joint graph that torch traced while the backward pass ran.

    It tags the nodes of the forward pass, which come first.
    """
    nodes = list(joint.nodes)
    tagged = [i for i, node in enumerate(nodes) if node.meta.get("partitioner_tag") in _OF_FORWARD]
    return set(nodes[tagged[-1] + 1 :]) if tagged else set()


def is_backward_write(node: fx.Node) -> bool:
    """True for an operator at the end of a joint graph that belongs to the backward pass and changes an input."""
    return is_write(node) and node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def is_write(node: fx.Node) -> bool:
    """Whether a node changes memory that was there before, as ``copy_`` does at the end of a joint graph."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def changed_inputs(joint: fx.Graph) -> dict[fx.Node, bool]:
    """Placeholders whose memory a joint graph changes, and whether it does so in the forward pass.

    Torch says so in two ways: by an operator at the end of the graph that writes to the placeholder, or, where autograd
    has to know of the change, by a forward output that the runtime copies to the input.
    """
    found: dict[fx.Node, bool] = {}
    for node in joint.nodes:
        written = node.args[0] if is_write(node) and node.target is not _SET else None
        if isinstance(written, fx.Node) and written.op == "placeholder":
            found[written] = found.get(written, False) or not is_backward_write(node)
    returned = [_undivided(descriptor) for descriptor in joint.output_node().meta.get("desc", ())]
    copied = {_undivided(output.mutated_input) for output in returned if isinstance(output, InputMutationAOTOutput)}
    for node in joint.find_nodes(op="placeholder"):
        if _undivided(node.meta.get("desc")) in copied and isinstance(node.meta["val"], torch.Tensor):
            found[node] = True
    return found


def _undivided(descriptor: Any) -> Any:
    """The descriptor of a tensor subclass for those of its inner tensors."""
    while (base := getattr(descriptor, "base", None)) is not None:
        descriptor = base
    return descriptor
