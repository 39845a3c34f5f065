"""What is in memory while a graph runs in its order, from fake values alone.

Inductor fuses: a value that only fusible operators read, before the next kernel of a library runs, never gets memory.
So memory have: inputs and outputs; results of matmuls, attention and whatever is no element-wise operator; what one of
these reads; and what is also read after one of them ran. A value that has none makes what it is computed from live
until it is read itself. An element-wise result takes the place of an input that it reads last. Views count as what they
look at.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from oasis_fx.graph.edits import outputs, value
from oasis_fx.memory.node_costs import is_matmul, num_bytes, storage_node

_FUSED = ("sum", "mean", "amax", "amin", "var_mean", "var", "convert_element_type", "where", "cat", "full", "iota")
_NAMED = 3  # of what is in memory at one moment


@dataclass(frozen=True)
class Moment:
    """What is in memory just as one node runs, in bytes.

    Attributes:
        node: its name.
        returned: of values that the graph returns and that are there by now.
        given: of the graph's inputs that are still needed.
        temporary: of all others.
        wide: of those among the three whose last dimension has the size that was asked for, such as logits.
        largest: the names of the nodes that own the most memory then, the largest first, and the bytes of each.
    """

    node: str
    returned: int
    given: int
    temporary: int
    wide: int
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        return self.returned + self.given + self.temporary


def moments(graph: fx.Graph, elsewhere: Collection[str] = (), wide: int = -1, chunks: int = 1) -> list[Moment]:
    """Return a moment for each node that runs.

    Args:
        elsewhere: names of inputs that exist anyway and do not count, such as weights.
        wide: size of the last dimension of values that count apart.
        chunks: in how many chunks another kernel would make these, so that only one of them is there.
    """
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    returned = {storage_node(node) for node in outputs(graph) if isinstance(node, fx.Node)}
    kernels = [index for index, node in enumerate(nodes) if _is_kernel(node)]
    stored = {node for node in nodes if _is_stored(node, returned, position, kernels)}
    last: dict[fx.Node, int] = {}  # of values with memory: when they are read last
    needed: dict[fx.Node, int] = {}  # of values without: when they are
    for node in reversed(nodes):
        if node.op == "output":
            continue
        users = [user for user in node.users if user.op != "output"]
        at = max((needed.get(user, position[user]) for user in users), default=position[node])
        if node not in stored:
            needed[node] = at
        owner = storage_node(node)
        last[owner] = max(last.get(owner, 0), at)

    def is_wide(node: fx.Node) -> bool:
        size = value(node).shape
        return len(size) > 1 and size[-1] == wide

    found = []
    alive: dict[fx.Node, int] = {}
    dying: dict[int, list[fx.Node]] = {}
    inputs = {node: None for node in nodes if node.op == "placeholder"}  # in order, as equal sizes are named in it
    for node in inputs:
        if node.name not in elsewhere and isinstance(value(node), torch.Tensor):
            alive[node] = num_bytes(value(node)) // (chunks if is_wide(node) else 1)
            dying.setdefault(last.get(node, 0), []).append(node)
    for index, node in enumerate(nodes):
        if node.op == "call_function":
            if node in stored:
                alive[node] = num_bytes(value(node)) // (chunks if is_wide(node) else 1)
                _reuse(node, alive, dying.get(index, ()), returned)
                dying.setdefault(last.get(node, index), []).append(node)
            out = sum(size for one, size in alive.items() if one in returned)
            given = sum(size for one, size in alive.items() if one in inputs and one not in returned)
            apart = sum(size for one, size in alive.items() if is_wide(one))
            most = heapq.nlargest(_NAMED, alive.items(), key=operator.itemgetter(1))
            largest = tuple((one.name, size) for one, size in most if size)
            found.append(Moment(node.name, out, given, sum(alive.values()) - out - given, apart, largest))
        for one in dying.pop(index, ()):
            if one not in returned:
                alive.pop(one, None)
    return found


def _reuse(node: fx.Node, alive: dict[fx.Node, int], dying: Collection[fx.Node], returned: set[fx.Node]) -> None:
    """An element-wise result, or a scatter, takes the memory of an input that is read for the last time."""
    if is_matmul(node):
        return
    for source in dying:
        if source is not node and source not in returned and alive.get(source) == alive[node]:
            del alive[source]
            return


def _is_kernel(node: fx.Node) -> bool:
    """Whether a node runs by itself: nothing is fused over it."""
    if is_matmul(node):
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    return torch.Tag.pointwise not in node.target.tags and name not in _FUSED and storage_node(node) is node


def _is_stored(node: fx.Node, returned: set[fx.Node], position: dict[fx.Node, int], kernels: list[int]) -> bool:
    if node.op != "call_function" or not isinstance(value(node), torch.Tensor) or storage_node(node) is not node:
        return False
    if node in returned or _is_kernel(node) or any(_is_kernel(maker) for maker in node.all_input_nodes if _many(maker)):
        return True
    readers = _readers(node)
    if any(_is_kernel(reader) for reader in readers):
        return True
    read_last = max((position[reader] for reader in readers), default=position[node])
    read_first = min((position[reader] for reader in readers), default=position[node])
    return any(read_first < kernel < read_last for kernel in kernels)


def _many(node: fx.Node) -> bool:
    return isinstance(value(node), tuple | list)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads a value, through views."""
    found, pending = [], list(node.users)
    while pending:
        user = pending.pop()
        if user.op == "call_function" and storage_node(user) is not user:
            pending += user.users
        elif user.op != "output":
            found.append(user)
    return found
