"""Run the passes over a model without generating code: for the printer, the report, and warm compile caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from oasis_fx.config import Settings
from oasis_fx.lowering import Compiled, CompiledGraph, lower, run_node_by_node
from oasis_fx.torch_private import compile_caches_disabled


def trace_model(
    model: torch.nn.Module, example_inputs: Any, settings: Settings, *, dynamic: bool | None = None
) -> list[CompiledGraph]:
    """Run ``model`` once in training mode of autograd and return what was compiled, one entry a graph.

    The graphs are those of the inner compiler named in ``settings``, but its code is not generated: they run
    node by node. Parameters and gradients of ``model`` are left as they were.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        dynamic: as in `torch.compile`.
    """
    records: list[CompiledGraph] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        with compile_caches_disabled():
            compiled, record = lower(gm, inputs, settings, settings.options, inner_compile=run_node_by_node)
        records.append(record)
        return compiled

    torch.compiler.reset()
    compiled_model = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.enable_grad():
        if isinstance(example_inputs, Mapping):
            compiled_model(**example_inputs)
        elif isinstance(example_inputs, tuple | list):
            compiled_model(*example_inputs)
        else:
            compiled_model(example_inputs)
    return records
