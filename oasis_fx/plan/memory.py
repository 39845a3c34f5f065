"""The peak of a training step by kind, for what a user would choose between.

A model of L blocks is extrapolated from one of three: each block more keeps as much as the three do in the mean, and
leaves as many gradients behind. A model of fewer blocks is traced whole. The peak is sought in three phases: in the
forward pass; in the backward pass, where all blocks are saved at first and all gradients there at last; and in the
optimizer step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from oasis_fx._torch.joint_graphs import input_placeholders
from oasis_fx.graph.edits import shape
from oasis_fx.inspect.state_bytes import moment_bytes, sites_by_basis, state_bytes
from oasis_fx.memory.node_costs import hint, saved_storages
from oasis_fx.plan.liveness import Moment, moments
from oasis_fx.plan.tensors import Words, block_of
from oasis_fx.plan.trace import FakeModel, Halves
from oasis_fx.runtime.optim.chunks import CHUNK

KINDS = ("weights", "gradients", "optimizer", "bases", "activations", "logits", "temporaries")
# Bytes a number of the moments that `OasisAdamW(state_bits=8)` decodes at once: both in float32, copies of both by
# which it tells what has changed, and what the encoder makes of one of them (tests/plan/test_eight_bits.py).
_DECODED = 25
CHUNKS = 16  # of a cross-entropy that never makes all logits at once


@dataclass(frozen=True)
class Memory:
    """What a step needs at its peak.

    Attributes:
        bytes_of: bytes by kind.
        phase: in which the peak is: forward, backward or optimizer.
        largest: the largest tensors beside weights and states, in words, and the bytes of each.
    """

    bytes_of: Mapping[str, int]
    phase: str
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> int:
        return sum(self.bytes_of.values())


@dataclass(frozen=True)
class States:
    """Bytes that are there for all of a step: weights, optimizer states, bases."""

    weights: int
    optimizer: int
    bases: int = 0


@dataclass(frozen=True)
class Phases:
    """The highest moments of a graph pair, in bytes.

    Attributes:
        forward, backward: activations, logits, gradients and temporaries.
        gradients: when the backward pass is done.
        largest: by phase, the largest tensors in words, and the bytes of each.
        step: temporaries of the optimizer step.
    """

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    gradients: int
    largest: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    step: int = 0


def peak(states: States, phases: Phases) -> Memory:
    """Return the highest of the three phases."""
    fixed = {"weights": states.weights, "optimizer": states.optimizer, "bases": states.bases}
    candidates = {
        "forward": phases.forward,
        "backward": phases.backward,
        "optimizer": {"gradients": phases.gradients, "temporaries": phases.step},
    }
    phase = max(candidates, key=lambda name: sum(candidates[name].values()))
    found = {kind: fixed.get(kind, 0) + candidates[phase].get(kind, 0) for kind in KINDS}
    return Memory(found, phase, phases.largest.get(phase, ()))


def phases(
    traced: FakeModel,
    graphs: Halves,
    *,
    rewritten: bool,
    block_gradients: int,
    num_traced: int,
    blocks: int,
    vocabulary: int,
    chunked: bool,
) -> Phases:
    """Extrapolate the phases of a model of ``blocks`` blocks.

    Args:
        traced: the model of ``num_traced`` blocks.
        graphs: of that model.
        rewritten: whether they are as this backend rewrites them.
        block_gradients: bytes of the gradients of one block.
        vocabulary: the last size of logits.
        chunked: whether a loss in chunks keeps logits small.
    """
    forward, backward = graphs
    static = {node.name for node in forward.find_nodes(op="placeholder")}
    chunks = CHUNKS if chunked else 1
    ahead = moments(forward, static, vocabulary, chunks)
    back = moments(backward, static, vocabulary, chunks)
    gradients = back[-1].returned if back else 0
    more = blocks - num_traced
    block_saved = saved_bytes(forward, traced.trace.num_forward_outputs, num_traced)[1]
    first, last = _span_of_middle(backward)

    def backward_total(index: int, moment: Moment) -> int:
        if index < first:
            return moment.total + more * block_saved
        if index > last:
            return moment.total + more * block_gradients
        return moment.total + more * max(block_saved, block_gradients)

    at, top = max(enumerate(back), key=lambda item: backward_total(*item))
    extra = backward_total(at, top) - top.total
    rise = {"activations": top.given, "gradients": top.returned, "temporaries": top.temporary}
    grown = "gradients" if at > last or (at >= first and block_gradients > block_saved) else "activations"
    rise[grown] += extra
    peak_ahead = max(ahead, key=lambda moment: moment.total)
    total_ahead = {"activations": peak_ahead.returned + more * block_saved, "temporaries": peak_ahead.temporary}
    words = Words(traced, graphs, rewritten=rewritten, vocabulary=vocabulary)
    largest = {"forward": peak_ahead.largest, "backward": top.largest, "optimizer": back[-1].largest if back else ()}
    return Phases(
        _with_logits(total_ahead, peak_ahead.wide),
        _with_logits(rise, top.wide),
        gradients + more * block_gradients,
        {phase: tuple((words.of(name), size) for name, size in tensors) for phase, tensors in largest.items()},
    )


def saved_bytes(forward: fx.Graph, num_forward_outputs: int, blocks: int) -> tuple[int, int]:
    """Count the bytes that a forward graph of a few blocks keeps: all, and those of a block in the mean.

    Under a budget blocks change sides one after another, so that no single one stands for all.
    """
    saved = saved_storages(forward, num_forward_outputs)
    inside = sum(saved[node.name] for node in forward.nodes if node.name in saved and block_of(node) is not None)
    return sum(saved.values()), inside // blocks


def trained_bytes(traced: FakeModel, rewritten: bool) -> int:
    """Count the bytes of all gradients: dense ones, and G and C of what is rewritten."""
    total = sum(p.numel() * p.itemsize for p in trained(traced.model))
    if not rewritten:
        return total
    ours = state_bytes(traced.record, traced.trace)
    return total - ours.dense_gradients + ours.gradients


def _span_of_middle(backward: fx.Graph) -> tuple[int, int]:
    """First and last moment of the backward pass that belong to the block with number 1."""
    calls = [node for node in backward.nodes if node.op == "call_function"]
    middle = [index for index, node in enumerate(calls) if block_of(node) == 1]
    return (middle[0], middle[-1]) if middle else (0, len(calls))


def _with_logits(kinds: Mapping[str, int], logits: int) -> dict[str, int]:
    """Logits apart, from among the temporaries and then the activations."""
    found = dict(kinds)
    left = logits
    for kind in ("temporaries", "activations"):
        taken = min(left, found.get(kind, 0))
        found[kind] = found.get(kind, 0) - taken
        left -= taken
    return found | {"logits": logits - left}


def weight_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.itemsize for p in model.parameters())


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that get gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def adam_states(model: torch.nn.Module) -> States:
    """Return the states of AdamW: two moments of each trained parameter, in its own dtype."""
    return States(weight_bytes(model), sum(2 * p.numel() * p.itemsize for p in trained(model)))


def adam8bit_states(model: torch.nn.Module) -> States:
    """Return the states of torchao's 8-bit AdamW: a byte a moment, a float32 every 256; plain below 4096 elements."""
    return States(weight_bytes(model), sum(2 * moment_bytes(p.numel(), p.dtype, 8) for p in trained(model)))


def galore_states(model: torch.nn.Module, names: Collection[str], rank: int) -> States:
    """Return the states of GaLore on the weights that we would rewrite.

    Moments have r rows on the longer side, the projector is on the shorter.
    """
    total = bases = 0
    for name, p in model.named_parameters():
        if name in names and p.dim() == 2:
            short, long = sorted(p.shape)
            total += 2 * min(rank, short) * long * p.itemsize
            bases += min(rank, short) * short * p.itemsize
        else:
            total += 2 * p.numel() * p.itemsize
    return States(weight_bytes(model), total, bases)


def oasis_states(traced: FakeModel, bits: int = 32) -> States:
    """Return the states of `OasisAdamW`: moments of m x r, bases of n x r in float32; of other weights AdamW's.

    Args:
        bits: 8 where all moments are kept in eight bits.
    """
    ours = state_bytes(traced.record, traced.trace, bits)
    dense = adam_states(traced.model) if bits == 32 else adam8bit_states(traced.model)
    return replace(dense, optimizer=dense.optimizer - ours.dense_moments + ours.moments, bases=ours.bases)


def eight_bit_temporaries(traced: FakeModel) -> int:
    """Count the bytes that a step in eight bits needs beside its states.

    It decodes the moments of as many numbers at a time as make a chunk, fewer where the model has fewer.
    """
    placeholders = input_placeholders(traced.trace.before.graph)
    found = [0]
    rewritten = set()
    for sites in sites_by_basis(traced.trace).values():
        rank = hint(shape(placeholders[sites[0].inputs.basis])[1])
        for site in sites:
            rewritten.add(traced.record.names[site.inputs.weight])
            found.append(hint(shape(placeholders[site.inputs.slot])[0]) * rank)
    found += [p.numel() for name, p in traced.model.named_parameters() if p.requires_grad and name not in rewritten]
    return _DECODED * min(sum(found), CHUNK)


def extrapolate(fewer: States, traced: States, more: int) -> States:
    """Extrapolate the states of a model of ``more`` blocks more than are traced, from one block fewer and these."""
    return replace(
        traced,
        weights=traced.weights + more * (traced.weights - fewer.weights),
        optimizer=traced.optimizer + more * (traced.optimizer - fewer.optimizer),
        bases=traced.bases + more * (traced.bases - fewer.bases),
    )
