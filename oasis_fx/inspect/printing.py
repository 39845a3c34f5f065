"""A graph as a Python program: one line a node, with shapes and notes; what is printed runs and computes the same."""

from __future__ import annotations

import keyword
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from oasis_fx.graph.edits import value
from oasis_fx.inspect.nodes import NodeFacts
from oasis_fx.inspect.notes import Notes, returned

_DTYPES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.bool: "b8",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
    torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def print_graph(
    gm: fx.GraphModule,
    *,
    title: str = "graph",
    names: Mapping[str, str] | None = None,
    facts: Mapping[str, NodeFacts] | None = None,
    labels: Sequence[str] | None = None,
    body: Sequence[fx.Node] | None = None,
) -> str:
    """Return ``gm`` as the source of a function ``title``.

    Nothing in the text depends on the machine or the time. The function takes the graph's inputs one by one,
    after a ``self`` (the module) where the graph reads attributes of it.

    Args:
        names: printed names by node name, from `number_nodes`.
        facts: what to say of the nodes in comments, by node name; None says nothing.
        labels: what to say of the values that are returned, in comments.
        body: the nodes to show, in their order; the function then takes what they read from elsewhere, and returns
            what is read elsewhere. None: the whole graph.
    """
    graph = gm.graph
    known = number_nodes([graph], {}) if names is None else names
    printed = {node: known[node.name] for node in graph.nodes if node.op != "output"}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    values: Any = graph.output_node().args[0]
    if body is None:
        body = list(printed)
    else:
        inputs, values, labels = *_boundary(graph, body), None
    notes = Notes(graph, facts or {}, printed, body)
    modules: dict[str, None] = {}
    lines = ["    self,"] if any(node.op == "get_attr" for node in body) else []
    lines += [f"    {printed[node]}{annotation(value(node))},{notes.behind(node)}" for node in inputs]
    lines.append("):")
    for node in (node for node in body if node.op != "placeholder"):
        lines += [f"    {line}" for line in notes.ahead(node)]
        lines.append(f"    {printed[node]}{annotation(value(node))} = {_computed(node, printed, modules)}")
        lines[-1] += notes.behind(node)
    lines += [f"    {line}" for line in notes.saved()]
    if labels is None:
        lines.append(f"    return {_argument(values, printed)}")
    else:
        lines += [f"    {line}" for line in returned([_argument(item, printed) for item in values], labels)]
    head = ["import torch", *(["import operator"] if "operator" in modules else [])]
    head += [f"{namespace} = torch.ops.{namespace}" for namespace in sorted(modules) if namespace != "operator"]
    return "\n".join([*head, "", "", f"def {title}(", *lines]) + "\n"


def _computed(node: fx.Node, printed: Mapping[fx.Node, str], modules: dict[str, None]) -> str:
    """The right side of a statement; namespaces that it needs go to ``modules``."""
    if node.op == "get_attr":
        return _attribute(str(node.target))
    called = _callee(node, printed, modules)
    given = [_argument(a, printed) for a in (node.args[1:] if node.op == "call_method" else node.args)]
    given += [f"{key}={_argument(a, printed)}" for key, a in node.kwargs.items()]
    return f"{called}({', '.join(given)})"


def _boundary(graph: fx.Graph, body: Sequence[fx.Node]) -> tuple[list[fx.Node], tuple[fx.Node, ...]]:
    """What the nodes of ``body`` read from elsewhere, its inputs among it, and which of them others read."""
    inside = set(body)
    read = {source for node in body for source in node.all_input_nodes} - inside
    inputs = [node for node in graph.nodes if node in read or (node in inside and node.op == "placeholder")]
    return inputs, tuple(n for n in body if n.op != "placeholder" and any(user not in inside for user in n.users))


def number_nodes(graphs: Iterable[fx.Graph], labels: Mapping[str, str]) -> dict[str, str]:
    """Choose names to print, by node name: nodes of an operator are numbered in the order of their first graph.

    A node that several graphs have keeps its name in all of them, so that a rewrite shows as what it changes.

    Args:
        labels: what to call nodes, by node name, where the operator says too little: inputs.
    """
    printed: dict[str, str] = {}
    # What the text itself calls must keep its meaning.
    taken = {"self", "torch", "operator", "aten", "prims", "float", "slice", "getattr", *keyword.kwlist}
    numbers: Counter[str] = Counter()
    for node in (node for graph in graphs for node in graph.nodes if node.op != "output"):
        if node.name in printed:
            continue
        is_value = node.op in ("placeholder", "get_attr")
        stem = _identifier(labels.get(node.name, node.name if is_value else operator_name(node)))
        name = stem if numbers[stem] == 0 else f"{stem}_{numbers[stem]}"
        while name in taken:
            numbers[stem] += 1
            name = f"{stem}_{numbers[stem]}"
        numbers[stem] += 1
        taken.add(name)
        printed[node.name] = name
    return printed


def _identifier(text: str) -> str:
    word = re.sub(r"\W", "_", text)
    return f"_{word}" if word[:1].isdigit() else word


def _attribute(path: str) -> str:
    found = "self"
    for part in path.split("."):
        found = f"{found}.{part}" if part.isidentifier() else f'getattr({found}, "{part}")'
    return found


def annotation(shown: Any) -> str:
    """Return ``: "f32[6, 2]"`` for a tensor, the same of each for several, nothing for what has no shape."""
    text = describe(shown)
    return f': "{text}"' if text else ""


def describe(shown: Any) -> str:
    """Return ``f32[6, 2]`` for a tensor, ``Sym(s0)`` for a size, the same of each for several, else empty."""
    if isinstance(shown, torch.Tensor):
        sizes = ", ".join(str(size) for size in shown.shape)
        return f"{_DTYPES.get(shown.dtype, str(shown.dtype))}[{sizes}]"
    if isinstance(shown, torch.SymInt):
        return f"Sym({shown})"
    if isinstance(shown, tuple | list):
        return f"({', '.join(describe(item) for item in shown)})"
    return ""


def operator_name(node: fx.Node) -> str:
    """Return the short name of what a node calls: ``mm``, ``getitem``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket.__name__)
    return str(getattr(node.target, "__name__", node.target)).replace(".", "_")


def _callee(node: fx.Node, names: Mapping[fx.Node, str], modules: dict[str, None]) -> str:
    target = node.target
    if node.op == "call_method":
        return f"{names[node.args[0]]}.{target}"  # type: ignore[index]
    if isinstance(target, torch._ops.OpOverload):
        modules[target.namespace] = None
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{target.__name__}"
    if getattr(operator, getattr(target, "__name__", ""), None) is target:
        modules["operator"] = None
        return f"operator.{target.__name__}"  # type: ignore[union-attr]
    module = getattr(target, "__module__", None) or "torch"
    return f"{module}.{getattr(target, '__qualname__', target)}"


def _argument(given: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(given, fx.Node):
        return names[given]
    if isinstance(given, tuple):
        return f"({', '.join(_argument(item, names) for item in given)}{',' if len(given) == 1 else ''})"
    if isinstance(given, list):
        return f"[{', '.join(_argument(item, names) for item in given)}]"
    if isinstance(given, dict):
        return f"{{{', '.join(f'{key!r}: {_argument(item, names)}' for key, item in given.items())}}}"
    if isinstance(given, slice):
        return f"slice({', '.join(_argument(item, names) for item in (given.start, given.stop, given.step))})"
    if isinstance(given, torch._ops.OpOverload):
        return f"torch.ops.{given}"  # what a higher-order operator runs
    if isinstance(given, torch.device):
        return f"torch.{given!r}"
    if isinstance(given, float) and (given != given or given in (float("inf"), -float("inf"))):
        return f"float('{given}')"
    return repr(given)
