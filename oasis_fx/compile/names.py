"""Readable names of a graph's parameters, for globs and messages. Never for finding a parameter again."""

from __future__ import annotations

import re

from torch import fx

from oasis_fx._torch.dynamo_graphs import input_source

_STEP = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.([A-Za-z]\w*)")
# What is no step of a path: `torch.compile` wraps a module as ``_orig_mod``, and Dynamo reads some modules as
# ``__dict__['_modules'][name]``.
_NO_STEP = ("_orig_mod", "_modules", "_parameters")
# Where the model itself begins. Its forward may be a bound method that something wraps, ``L['o'].f.__self__``, or the
# model may be an argument: ``L['args'][0]``, as under Accelerate's bf16, or ``L['fn'].args[0]`` of `functools.partial`.
_ROOT = re.compile(r"^[LG]\['[^']*'\](?:.*\.__self__(?=\.)|\.args\[\d+\]|(?<=\['args'\])\[\d+\])?")


def weight_name(placeholder: fx.Node) -> str:
    """Return the dotted path from the compiled module to a parameter, such as ``model.layers.0.mlp.up_proj.weight``.

    Read off Dynamo's source text: ``L['self']._modules['fc']._parameters['weight']`` is ``fc.weight``.
    Where Dynamo gives none (a graph split for distributed training), it is read off the placeholder's own name.
    """
    source = input_source(placeholder)
    if source is None:
        return _from_placeholder(placeholder.name)
    path = [next(part for part in match if part) for match in _STEP.findall(without_root(source))]
    return without_wrappers(".".join(path)) or placeholder.name


def without_root(source: str) -> str:
    """Drop the front of a source text of Dynamo's, up to the model: ``L['self']``, ``L['args'][0]``."""
    return _ROOT.sub("", source)


def without_wrappers(path: str) -> str:
    """Drop the steps of a dotted path that the user's own model does not have."""
    return ".".join(step for step in path.split(".") if step not in _NO_STEP)


def _from_placeholder(name: str) -> str:
    """``l_self_modules_fc_parameters_weight_`` is ``fc.weight``; a name of another form stays as it is."""
    steps = re.split(r"_(?:modules|parameters)_", name.removeprefix("l_self").rstrip("_"))
    return ".".join(steps[1:]) if name.startswith("l_self_") and len(steps) > 1 else name


def relative_name(name: str, to: str) -> str:
    """Shorten a name beside another: ``layers.0.k_proj.weight`` beside ``layers.0.q_proj.weight`` is ``k_proj``."""
    parts, others = name.split("."), to.split(".")
    while len(parts) > 1 and len(others) > 1 and parts[-1] == others[-1]:
        parts, others = parts[:-1], others[:-1]
    while len(parts) > 1 and len(others) > 1 and parts[0] == others[0]:
        parts, others = parts[1:], others[1:]
    return ".".join(parts)
