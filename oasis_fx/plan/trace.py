"""Graphs of a model with few blocks, on fake tensors: nothing is allocated, nothing computed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from oasis_fx._torch.compiler import FakeTensorMode, functorch_config
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.compile.partition_within import partition_within
from oasis_fx.compile.pipeline import Trace, copy_graph
from oasis_fx.inspect.graphs import partition_by_torch, trace_of
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.passes.early_statistics import early_statistics
from oasis_fx.settings import Settings

Partition = tuple[fx.Graph, fx.Graph]


@dataclass(frozen=True)
class Traced:
    """One model that was traced.

    Attributes:
        model: with fake parameters.
        record, trace: what the backend made of it.
    """

    model: torch.nn.Module
    record: CompiledGraph
    trace: Trace


def trace_fake(config: Any, batch: int, seq: int, dtype: torch.dtype, settings: Settings, lora_rank: int = 0) -> Traced:
    """Trace a causal language model of transformers.

    Args:
        lora_rank: over 0: with adapters on every linear layer of the blocks, all else frozen.

    Raises:
        ValueError: it does not compile to one graph.
    """
    from transformers import AutoModelForCausalLM

    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = AutoModelForCausalLM.from_config(config).train()  # type: ignore[no-untyped-call]
        finally:
            torch.set_default_dtype(default)
        if lora_rank:
            add_adapters(model, lora_rank)
        tokens = torch.zeros(batch, seq, dtype=torch.long)
        records = trace_model(model, {"input_ids": tokens, "labels": tokens}, settings)
        traces = [(record, trace_of(record)) for record in records]
    found = [(record, trace) for record, trace in traces if trace is not None]
    if len(found) != 1:
        raise ValueError(
            f"the model compiles to {len(records)} graphs, {len(found)} of them in training: one is needed"
        )
    return Traced(model, *found[0])


class Adapted(torch.nn.Module):
    """A frozen linear layer with an adapter beside it, as peft's: in float32, its input cast for it."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = torch.nn.Parameter(torch.zeros(rank, base.in_features, dtype=torch.float32))
        self.lora_b = torch.nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted = torch.nn.functional.linear(torch.nn.functional.linear(x.float(), self.lora_a), self.lora_b)
        return self.base(x) + adapted.to(x.dtype)  # type: ignore[no-any-return]


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """Freeze a model and put an adapter beside each linear layer but its head.

    peft itself moves adapters to the layer's device, which fake parameters do not survive.
    """
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        if isinstance(layer, torch.nn.Linear) and last != "lm_head":
            setattr(model.get_submodule(path), last, Adapted(layer, rank))


def partition_as(traced: Traced, budget: int | float | None, *, rewritten: bool) -> Partition:
    """Forward and backward graph under a budget: by us if ``rewritten``, else by torch (a share, or None)."""
    trace = traced.trace
    partition = partial(partition_by_torch, trace)

    number = trace.num_forward_outputs
    if not rewritten:
        share = 1.0 if budget is None else float(budget)
        with functorch_config.patch(activation_memory_budget=share):
            forward, backward = partition(copy_graph(trace.before), number)
    elif budget is None:
        forward, backward = partition(copy_graph(trace.after), number)
    else:
        forward, backward = partition_within(copy_graph(trace.after), copy_graph, partition, number, budget)
    early_statistics(backward.graph)
    return forward.graph, backward.graph
