"""What the backend did to each weight of a compiled graph, and what that costs and saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from oasis_fx._torch.joint_graphs import input_placeholders
from oasis_fx.compile.joint import Trace
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.graph.edits import dependents, shape
from oasis_fx.inspect.decisions import Decision, decisions
from oasis_fx.inspect.graphs import stock_halves, trace_of
from oasis_fx.inspect.report_table import format_report
from oasis_fx.inspect.state_bytes import sites_by_basis, state_bytes
from oasis_fx.memory.node_costs import hint, matmul_flops, num_tokens, saved_storages, storage_node


@dataclass(frozen=True)
class WeightRow:
    """A weight with a low-rank gradient.

    Attributes:
        name: dotted path from the compiled module.
        shape: as the weight is stored.
        rank: columns of its basis.
        shares_with: names of the other weights on its basis.
        saved_bytes_before, saved_bytes_after: kept for the backward pass on behalf of the basis' weights, all in
            the row of the first of them: X before; P, C and what else is made of Q after, and X where it is still
            kept. An X that several bases read counts for the first.
        flops_before, flops_after: of the weight's gradient: 2 N m n before; 2 N m r after, with an even share of
            the 4 N n r of P = X Q and C = X^T P. Summed over the weight's uses.
        note: what makes the saved bytes differ from N n before and N r + n r after; empty where nothing does.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    shares_with: tuple[str, ...]
    saved_bytes_before: int
    saved_bytes_after: int
    flops_before: float
    flops_after: float
    note: str


@dataclass(frozen=True)
class SkippedRow:
    """A weight that keeps its dense gradient, and why; the shape is None where no pass saw the weight."""

    name: str
    shape: tuple[int, ...] | None
    reason: str


@dataclass(frozen=True)
class Totals:
    """Totals of one graph, before (the same graph by stock `torch.compile`) and after.

    Attributes:
        saved_bytes_before, saved_bytes_after: kept for the backward pass, each storage once, inputs aside. Before:
            torch's min-cut under the settings of `torch._functorch.config` at the time of the report.
        matmul_flops_before, matmul_flops_after: forward and backward, recomputed work included.
        gradient_bytes_before, gradient_bytes_after: of the weights with low-rank gradients: dW; G and C.
        adam_bytes_before, adam_bytes_after: of the same weights: two moments in the weight's dtype; two of m x r,
            and the bases that are stored, in float32 (float64 for float64 weights).
    """

    saved_bytes_before: int
    saved_bytes_after: int
    matmul_flops_before: int
    matmul_flops_after: int
    gradient_bytes_before: int
    gradient_bytes_after: int
    adam_bytes_before: int
    adam_bytes_after: int


@dataclass(frozen=True)
class Traffic:
    """What `oasis_fx.distributed.prepare` has sent for a model; `str()` of it is a line.

    Attributes:
        sent_bytes: measured: what this rank has given to collectives.
        early_bytes: of it, what it gave while backward passes went on.
        dense_bytes: what the same gradients have at full size.
    """

    sent_bytes: int
    early_bytes: int
    dense_bytes: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph; `str()` of it is a table. ``totals`` is None where no weight got a basis.

    ``decisions`` are those of each tensor that the backward pass needs. ``traffic`` is what has gone from this rank to
    others so far, of the models that the graph was called for.
    """

    rows: tuple[WeightRow, ...]
    skipped: tuple[SkippedRow, ...]
    totals: Totals | None
    decisions: tuple[Decision, ...] = ()
    traffic: tuple[Traffic, ...] = ()

    def __str__(self) -> str:
        return format_report(self)


def report(records: Sequence[CompiledGraph]) -> list[GraphReport]:
    """Return a report for each compiled graph, in the order of their compilation.

    Where a compile cache had the result, the passes run once more, on fake values.
    """
    return [_report_graph(record, trace_of(record)) for record in records]


def _report_graph(record: CompiledGraph, trace: Trace | None) -> GraphReport:
    if trace is None:
        unused = {weight.weight: "nothing that the graph returns needs gradients" for weight in record.lifted}
        reasons = {**record.reasons, **unused}
        skipped = [SkippedRow(record.names[at], None, reason) for at, reason in sorted(reasons.items())]
        return GraphReport((), tuple(skipped), None)
    placeholders = input_placeholders(trace.before.graph)
    reasons = {**record.reasons, **{item.weight: item.reason for item in trace.skipped}}
    skipped = [
        SkippedRow(record.names[at], _known_shape(placeholders[at]) if at in placeholders else None, reason)
        for at, reason in sorted(reasons.items())
    ]
    stock = stock_halves(trace)
    states = state_bytes(record, trace)
    saved_before = saved_storages(stock[0], trace.num_forward_outputs)
    saved_after = saved_storages(trace.forward.graph, trace.num_forward_outputs)
    totals = Totals(
        sum(saved_before.values()),
        sum(saved_after.values()),
        sum(map(matmul_flops, stock)),
        matmul_flops(trace.forward.graph) + matmul_flops(trace.backward.graph),
        states.dense_gradients,
        states.gradients,
        states.dense_moments,
        states.moments + states.bases,
    )
    rows = _rows(record, trace, placeholders, saved_before, saved_after)
    traffic = tuple(Traffic(sync.sent, sync.early, sync.dense, str(sync)) for sync in record.syncs)
    return GraphReport(tuple(rows), tuple(skipped), totals, decisions(trace), traffic)


def _rows(
    record: CompiledGraph,
    trace: Trace,
    placeholders: Mapping[int, fx.Node],
    saved_before: Mapping[str, int],
    saved_after: Mapping[str, int],
) -> list[WeightRow]:
    rows = []
    counted: set[str] = set()
    for sites in sites_by_basis(trace).values():
        basis = placeholders[sites[0].inputs.basis]
        n, rank = _known_shape(basis)
        bases = [storage_node(x) for x in {term.x: None for site in sites for term in site.terms}]
        own = _made_of(trace.forward.graph, basis.name) & saved_after.keys()
        fresh = {node.name for node in bases} - counted
        counted |= fresh
        before = sum(saved_before.get(name, 0) for name in fresh)
        after = sum(saved_after.get(name, 0) for name in (own | fresh))
        of_gradient = sites[0].inputs.rule.of_gradient
        note = "dW projected" if of_gradient else _note(bases, bool(own), saved_before, saved_after)
        tokens = {term.x: num_tokens(term, n) for site in sites for term in site.terms}
        both = rank + _known_shape(placeholders[sites[0].inputs.slot])[1]  # columns of C, and of P
        share = sum(2 * count * n * both for count in tokens.values()) / len(sites)
        names = [record.names[site.inputs.weight] for site in sites]
        for site, name in zip(sites, names, strict=True):
            size = _known_shape(placeholders[site.inputs.weight])
            elements = sum(math.prod(_known_shape(term.dy)) for term in site.terms)  # N m each
            others = tuple(other for other in names if other != name)
            columns = _known_shape(placeholders[site.inputs.slot])[1]  # of a tail too
            flops = 2 * elements * n, 2 * elements * columns + share
            if of_gradient:  # the contraction itself is as it was
                flops = 0, 2 * math.prod(size) * rank * (2 if site.inputs.rule.statistic else 1)
            rows.append(WeightRow(name, size, rank, others, before, after, *flops, note))
            before = after = 0  # the group's bytes stand in its first row
    return rows


def _made_of(forward: fx.Graph, basis: str) -> set[str]:
    """Names of what the forward graph computes from a basis: nothing of the user's depends on one."""
    node = next(node for node in forward.find_nodes(op="placeholder") if node.name == basis)
    return {found.name for found in dependents([node])} - {basis}


def _note(
    bases: Sequence[fx.Node],
    projection_kept: bool,
    saved_before: Mapping[str, int],
    saved_after: Mapping[str, int],
) -> str:
    notes = []
    if all(node.op == "placeholder" for node in bases):
        notes.append("X is an input")
    elif not any(node.name in saved_before for node in bases):
        notes.append("X was recomputed")
    if any(node.name in saved_after for node in bases):
        notes.append("X also kept")
    if not projection_kept:
        notes.append("P recomputed")
    return ", ".join(notes)


def _known_shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(hint(size) for size in shape(node))
