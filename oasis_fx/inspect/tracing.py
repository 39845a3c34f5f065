"""Run the passes over a model without generating code, for the command line."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from oasis_fx._torch.compiler import compile_caches_disabled
from oasis_fx.backend import OasisBackend
from oasis_fx.compile.lowering import CompiledGraph, run_node_by_node
from oasis_fx.settings import Settings


def trace_model(
    model: torch.nn.Module, example_inputs: Any, settings: Settings, *, dynamic: bool | None = None
) -> list[CompiledGraph]:
    """Run the forward pass of ``model`` once, with gradients on, and return what was compiled, one entry a graph.

    The graphs are those of the inner compiler named in ``settings``, but its code is not generated: they run
    node by node. Parameters and gradients of ``model`` are left as they were.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic: as in `torch.compile`.

    Raises:
        ValueError: a glob of the settings matches no weight.
    """
    backend = OasisBackend(settings, inner_compile=run_node_by_node)
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.enable_grad(), compile_caches_disabled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo")  # torch's word on the caches that are off on purpose
        if isinstance(example_inputs, Mapping):
            compiled(**example_inputs)
        elif isinstance(example_inputs, tuple | list):
            compiled(*example_inputs)
        else:
            compiled(example_inputs)
    return backend.compiled_graphs()
