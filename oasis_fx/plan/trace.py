"""Graphs of a model with few blocks, on fake tensors: nothing is allocated, nothing computed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from oasis_fx._torch.fake_tensors import FakeTensorMode
from oasis_fx.compile.joint import Trace
from oasis_fx.compile.lowering import CompiledGraph
from oasis_fx.compile.partition import keeping_copies, torch_min_cut_later
from oasis_fx.compile.pipeline import split_joint
from oasis_fx.graph.edits import copy_graph
from oasis_fx.graph.facts import JointFacts
from oasis_fx.inspect.graphs import stock_halves, trace_of
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.settings import Settings

Halves = tuple[fx.Graph, fx.Graph]  # the forward and the backward graph


@dataclass(frozen=True)
class FakeModel:
    """A model with fake parameters, and what the backend made of it.

    Attributes:
        model: with fake parameters.
        record, trace: what the backend made of it.
    """

    model: torch.nn.Module
    record: CompiledGraph
    trace: Trace


def trace_fake(
    config: Any,
    batch: int,
    seq: int,
    dtype: torch.dtype,
    settings: Settings,
    lora_rank: int = 0,
    *,
    checkpointed: bool = False,
) -> FakeModel:
    """Trace a causal language model of transformers.

    Args:
        lora_rank: over 0: with adapters on every linear layer of the blocks, all else frozen.
        checkpointed: with activation checkpointing of each block.

    Raises:
        ValueError: it does not compile to one graph in training, and others without weights.
    """
    model, records = compile_fake(config, batch, seq, dtype, settings, lora_rank, checkpointed=checkpointed)
    traces = [(record, trace) for record in records if (trace := trace_of(record)) is not None]
    if len(traces) != 1:
        raise ValueError(
            f"the model compiles to {len(records)} graphs, {len(traces)} of them with weights in a subspace: plan "
            "needs exactly one, so a model without graph breaks between its blocks"
        )
    return FakeModel(model, *traces[0])


def compile_fake(
    config: Any,
    batch: int,
    seq: int,
    dtype: torch.dtype,
    settings: Settings,
    lora_rank: int = 0,
    *,
    checkpointed: bool = False,
) -> tuple[torch.nn.Module, list[CompiledGraph]]:
    """Build a causal language model of transformers on fake tensors, and compile it without code generation.

    Args:
        lora_rank, checkpointed: as in `trace_fake`.

    Returns:
        The model, and what the backend made of each of its graphs, with their traces.
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
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tokens = torch.zeros(batch, seq, dtype=torch.long)
        records = trace_model(model, {"input_ids": tokens, "labels": tokens}, settings)
        for record in records:
            trace_of(record)  # here, where what is fake stays so
    return model, records


class Adapted(torch.nn.Module):
    """A frozen linear layer with an adapter beside it, as peft's: in float32, its input cast for it."""

    def __init__(self, base: torch.nn.Module, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.lora_a = torch.nn.Parameter(torch.zeros(rank, in_features, dtype=torch.float32))
        self.lora_b = torch.nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted = torch.nn.functional.linear(torch.nn.functional.linear(x.float(), self.lora_a), self.lora_b)
        return self.base(x) + adapted.to(x.dtype)  # type: ignore[no-any-return]


def add_adapters(model: torch.nn.Module, rank: int) -> None:
    """Freeze a model and put an adapter beside each linear layer but its head.

    peft itself moves adapters to the layer's device, which fake parameters do not survive. GPT-2's linear layers are
    transformers' Conv1D, whose weight has the features of its input first.

    Raises:
        ValueError: it has no linear layer.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    model.requires_grad_(False)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # type: ignore[no-untyped-call]
    adapted = 0
    for name, layer in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        if layer is head or not isinstance(layer, torch.nn.Linear | Conv1D):
            continue
        m, n = layer.weight.shape if isinstance(layer, torch.nn.Linear) else reversed(layer.weight.shape)
        setattr(model.get_submodule(path), last, Adapted(layer, n, m, rank))
        adapted += 1
    if not adapted:
        raise ValueError("the model has no linear layer for an adapter of LoRA")


def halves_under(traced: FakeModel, budget: int | float | None, *, rewritten: bool) -> Halves:
    """Return the forward and the backward graph of a model under a budget.

    Args:
        budget: a share of what would be kept, or bytes (int, of a rewritten graph only); None is no budget.
        rewritten: as this backend runs them, and not stock `torch.compile`.
    """
    trace = traced.trace
    if not rewritten:
        return stock_halves(trace, 1.0 if budget is None else float(budget))
    facts = JointFacts(trace.num_forward_outputs)
    partition = keeping_copies(torch_min_cut_later(trace.static_inputs))
    forward, backward = split_joint(copy_graph(trace.after), facts, partition, budget)
    return forward.graph, backward.graph
