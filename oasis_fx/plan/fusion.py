"""What a graph runs as: kernels with their FLOPs and bytes, from fake values alone.

A matmul, attention, a convolution and whatever no compiler fuses is a kernel of its own. It reads its inputs and writes
its results once.

All else is fused, as Inductor fuses, by this approximation. Every kernel of a library comes a stage after whatever it
reads. An element-wise operator, a reduction or a gather belongs to the last stage in which it can still run before its
readers do. Within a stage those that read one another, or that read one and the same value, are one kernel. Such a
kernel reads each value from outside once, whatever it does with it, and writes a value only if something outside reads
it, or if the graph returns it. So a value that two kernels need is stored once and read twice, where Inductor might
compute it twice; a reduction over rows and one over columns count as one kernel, where Inductor may make two; and
constants have no bytes. No value stays in a cache between two kernels.

Views have no work. A view that is read counts by its own size, if that is less than that of what it looks at: slices
are read in part, expanded tensors once.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import fx

from oasis_fx.graph.edits import outputs, value
from oasis_fx.memory.node_costs import is_attention, is_matmul, node_flops, operator_of, value_bytes
from oasis_fx.plan.kernels import (
    Kernel,
    Kind,
    computes,
    element_flops,
    head_size,
    input_dtype,
    is_causal,
    is_fused,
    made_bytes,
    origin,
    reads,
    writes,
)
from oasis_fx.plan.tensors import block_of


def kernels_of(graph: fx.Graph) -> list[Kernel]:
    """Return the kernels that a graph runs as: those of libraries in its order, then the fused ones."""
    return _Fusion(graph).kernels()


class _Fusion:
    """The nodes of one graph by stage, and which of them run together."""

    def __init__(self, graph: fx.Graph) -> None:
        self.returned = {origin(node) for node in outputs(graph) if isinstance(node, fx.Node)}
        self.running = [node for node in graph.nodes if computes(node)]
        self.returned |= {node for node in self.running if writes(node)}
        self.reads = {node: list(reads(node)) for node in self.running}
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.running:
            for owner in {origin(source) for source, _ in self.reads[node]}:
                self.readers[owner].append(node)
        self.fused = {node for node in self.running if is_fused(node)}
        # Neither reads anything nor is wanted for itself: whoever needs it makes it on the way.
        self.constants = {n for n in self.fused if not self.reads[n] and n not in self.returned}
        self.stages = self._last_stages(self._first_stages())

    def kernels(self) -> list[Kernel]:
        alone = [self._library_kernel(node) for node in self.running if node not in self.fused]
        return [*alone, *(self._fused_kernel(group) for group in self._groups())]

    def _first_stages(self) -> dict[fx.Node, int]:
        """By node: how many kernels of libraries have run, one after another, when its inputs are there."""
        found: dict[fx.Node, int] = {}
        for node in self.running:
            behind = max((found.get(origin(source), 0) for source, _ in self.reads[node]), default=0)
            found[node] = behind if node in self.fused else behind + 1
        return found

    def _last_stages(self, first: dict[fx.Node, int]) -> dict[fx.Node, int]:
        found = dict(first)
        for node in reversed(self.running):
            if node in self.fused and node not in self.returned:
                before = [found[user] if user in self.fused else found[user] - 1 for user in self.readers[node]]
                found[node] = max(min(before, default=found[node]), found[node])
        return found

    def _groups(self) -> list[list[fx.Node]]:
        leaders: dict[object, object] = {}

        def leader(of: object) -> object:
            while leaders.setdefault(of, of) is not of:
                leaders[of] = leaders[leaders[of]]  # shorter paths, for those who ask next
                of = leaders[of]
            return of

        nodes = [node for node in self.running if node in self.fused and node not in self.constants]
        for node in nodes:
            for source, _ in self.reads[node]:
                # What is made in this stage, or what was there before it: both bring their readers together.
                made_by, stage = origin(source), self.stages[node]
                here = made_by in self.fused and self.stages[made_by] == stage
                if made_by not in self.constants:
                    leaders[leader(node)] = leader(made_by if here else (stage, made_by))
        groups: dict[object, list[fx.Node]] = defaultdict(list)
        for node in nodes:
            groups[leader(node)].append(node)
        return list(groups.values())

    def _library_kernel(self, node: fx.Node) -> Kernel:
        read, block = self._read_bytes([node]), block_of(node)
        kind, flops, head = Kind.FUSED, float(node_flops(node)), 0
        if is_matmul(node):
            kind = Kind.MATMUL
            if block is None:  # a matmul that our passes added is from where its operands are from
                block = next((of for given in node.all_input_nodes if (of := block_of(given)) is not None), None)
            if is_attention(node):
                kind = Kind.ATTENTION_BACKWARD if "backward" in str(operator_of(node)[0]) else Kind.ATTENTION
                head = head_size(node)
                flops *= 0.5 if is_causal(node) else 1.0
        written = made_bytes(node)
        return Kernel(node.name, kind, input_dtype(node), flops, read + written, head, block=block)

    def _fused_kernel(self, group: list[fx.Node]) -> Kernel:
        inside = set(group)
        written = sum(
            made_bytes(node)
            for node in group
            if node in self.returned or any(reader not in inside for reader in self.readers[node])
        )
        flops = sum(element_flops(node) for node in group)
        # Most of its nodes are from one block; sums of gradients, which are often the last, are from none.
        blocks = Counter(block for node in group if (block := block_of(node)) is not None).most_common(1)
        size = self._read_bytes(group) + written
        block = blocks[0][0] if blocks else None
        return Kernel(group[-1].name, Kind.FUSED, torch.float32, flops, size, block=block)

    def _read_bytes(self, nodes: list[fx.Node]) -> int:
        """Bytes that these nodes read from elsewhere: each part of a value once, and no value more than once."""
        inside = set(nodes)
        parts: dict[fx.Node, dict[object, int]] = defaultdict(dict)
        for node in nodes:
            for source, (view, size) in self.reads[node]:
                made_by = origin(source)
                if made_by not in inside and not (made_by in self.constants and node in self.fused):
                    parts[source][view] = max(size, parts[source].get(view, 0))
        return sum(min(sum(sizes.values()), value_bytes(value(source))) for source, sizes in parts.items())
