"""What a graph saves for the backward pass and computes in matmuls, counted on fake values."""

from __future__ import annotations

import math
import operator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from oasis_fx.graph.edits import aten, outputs, shape, value
from oasis_fx.graph.facts import Contraction, Kind

# Attention on a CPU, for which torch's counter has no formula: query, key and value, in the second behind dO.
_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
# Operators that run another one, and how many arguments stand ahead of it.
_AHEAD_OF_WRAPPED = {"run_and_save_rng_state": 0, "run_with_rng_state": 1, "graphsafe_run_with_rng_state": 0}


def hint(number: Any) -> int:
    """Return an int as it is, or the example value of a symbolic one; 0 where it depends on data and has none."""
    if isinstance(number, torch.SymInt):
        return int(number.node.hint) if number.node.has_hint() else 0
    return int(number)


def num_bytes(tensor: torch.Tensor) -> int:
    """Count the bytes of a tensor's elements, by the hints of symbolic sizes."""
    return math.prod(hint(size) for size in tensor.shape) * tensor.dtype.itemsize


def readable_bytes(count: int) -> str:
    """Write a number of bytes for a person: ``96 B``, ``1.5 KiB``, ``2.0 MiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"


def value_bytes(found: Any) -> int:
    """Count the bytes of a node's value: of a tensor, of several together, 0 of a size or of None."""
    if isinstance(found, tuple | list):
        return sum(value_bytes(item) for item in found)
    return num_bytes(found) if isinstance(found, torch.Tensor) else 0


def viewed(node: fx.Node) -> fx.Node | None:
    """Return what a node is a view of; None where it has memory of its own."""
    if node.op != "call_function":
        return None
    # An item of split() is a view of what is split; an item of var_mean() owns its memory.
    maker = node.all_input_nodes[0] if node.target is operator.getitem else node
    target = maker.target
    return maker.all_input_nodes[0] if isinstance(target, torch._ops.OpOverload) and _is_view(target) else None


@cache
def _is_view(target: torch._ops.OpOverload) -> bool:
    """By its schema, which says what shares memory: ``slice.Tensor(Tensor(a) self, ...) -> Tensor(a)``."""
    if target.overloadpacket is aten._unsafe_view:
        return True  # a view that autograd is not told of
    returned = target._schema.returns
    return bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write


def num_tokens(term: Contraction, n: int) -> int:
    """Return N of a contraction over n features: tokens, those of all experts together, or patches."""
    if term.kind is Kind.CONVOLUTION:
        batch, _, *places = (hint(size) for size in shape(term.dy))
        return batch * math.prod(places)
    return math.prod(hint(size) for size in shape(term.x)) // n


def storage_node(node: fx.Node) -> fx.Node:
    """Return the node that owns the memory of ``node``, behind views."""
    while (behind := viewed(node)) is not None:
        node = behind
    return node


def saved_storages(forward: fx.Graph, num_forward_outputs: int) -> dict[str, int]:
    """Count the bytes that a forward graph keeps for the backward, by the name of the node that owns the memory.

    Each storage counts once; inputs (weights and bases among them) exist anyway and do not count.
    """
    extra = outputs(forward)[num_forward_outputs:]
    owners = dict.fromkeys(storage_node(node) for node in extra if isinstance(node, fx.Node))
    kept = [node for node in owners if node.op != "placeholder" and isinstance(value(node), torch.Tensor)]
    return {node.name: num_bytes(value(node)) for node in kept}


def matmul_flops(graph: fx.Graph) -> int:
    """Count the floating-point operations of matmuls, attention and convolutions, as torch does."""
    return sum(node_flops(node) for node in graph.nodes)


def operator_of(node: fx.Node) -> tuple[torch._ops.OpOverload | None, tuple[Any, ...], dict[str, Any]]:
    """Return the operator that a node runs, and its arguments; None where it runs no operator of torch's.

    In a stock graph with checkpointed regions, what is tagged as random is wrapped in another operator, which keeps
    the state of the generator.
    """
    if node.op != "call_function":
        return None, (), {}
    target, args, kwargs = node.target, node.args, dict(node.kwargs)
    name = target.name() if isinstance(target, torch._ops.HigherOrderOperator) else ""  # type: ignore[no-untyped-call]
    if (ahead := _AHEAD_OF_WRAPPED.get(name)) is not None:
        target, args = args[ahead], args[ahead + 1 :]  # type: ignore[assignment]
        kwargs.pop("rng_state", None)
    return (target, args, kwargs) if isinstance(target, torch._ops.OpOverload) else (None, (), {})


def is_matmul(node: fx.Node) -> bool:
    """Tell whether `matmul_flops` counts a node."""
    target = operator_of(node)[0]
    return target is not None and (
        target.overloadpacket in (_ATTENTION, _ATTENTION_BACKWARD) or target.overloadpacket in flop_registry
    )


def is_attention(node: fx.Node) -> bool:
    """Tell whether a node that `matmul_flops` counts is attention in one operator."""
    return "attention" in str(operator_of(node)[0])


def node_flops(node: fx.Node) -> int:
    """Return what `matmul_flops` counts for a node; 0 for one that is none of those."""
    if not is_matmul(node):
        return 0
    target, given, named = operator_of(node)
    assert target is not None  # for the type checker: is_matmul has looked
    packet = target.overloadpacket
    args: Any
    args, kwargs = fx.node.map_arg((given, named), _sized)
    if packet is _ATTENTION:
        return int(sdpa_flop_count(*(given.shape for given in args[:3])))  # type: ignore[no-untyped-call]
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(given.shape for given in args[:4])))  # type: ignore[no-untyped-call]
    formula = flop_registry[packet]
    return int(formula(*args, **kwargs, out_val=_sized(node)))


def _sized(node: fx.Node) -> Any:
    """A value of a node with plain sizes, for formulas."""
    return _plain(value(node))


def _plain(found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return torch.empty([hint(size) for size in found.shape], dtype=found.dtype, device="meta")
    if isinstance(found, torch.SymInt):
        return hint(found)
    if isinstance(found, tuple | list):
        return type(found)(_plain(item) for item in found)
    return found
