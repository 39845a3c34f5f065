"""What Dynamo writes on the graphs that it hands to a backend: where inputs come from, and why a graph ended."""

from __future__ import annotations

from torch import fx

_STATIC_INPUT = {"_dynamo_static_input_type": "unguarded"}


def input_source(placeholder: fx.Node) -> str | None:
    """Dynamo's source text of a graph input, such as ``L['self']._modules['fc']._parameters['weight']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    return None if source is None else str(source.name)


def is_partial_graph(gm: fx.GraphModule) -> bool:
    """True where Dynamo broke the user's function: this graph does not see the whole model."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return True
    # What follows a graph break is compiled as a function of its own, named by Dynamo.
    stack = list(getattr(reason, "user_stack", ()) or ())
    return any("torch_dynamo_resume_in" in frame.name for frame in stack)


def copy_dynamo_attributes(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Carry over what AOTAutograd and the AOT cache read off a graph of Dynamo's."""
    target.meta = dict(source.meta)
    # Not `_backend_id`: under it, `caching_precompile` keeps the artifact of AOTAutograd and, in a warm process, calls
    # that in place of what a backend returned. It would get no bases. Without an artifact the graph is compiled again.
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    copy_input_sources(source.graph, target.graph)


def copy_input_sources(source: fx.Graph, target: fx.Graph) -> None:
    """Carry over what Dynamo notes of where each input of a graph comes from."""
    for old, new in zip(source.find_nodes(op="placeholder"), target.find_nodes(op="placeholder"), strict=False):
        # AOTAutograd asserts that each placeholder has the attribute; None is a legal value.
        new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]


def mark_static_input(placeholder: fx.Node) -> None:
    """Make ``placeholder`` an input of ours: it has no source in the user's code, and its memory never moves."""
    placeholder._dynamo_source = None  # type: ignore[attr-defined]
    placeholder.meta["tensor_dict"] = dict(_STATIC_INPUT)
