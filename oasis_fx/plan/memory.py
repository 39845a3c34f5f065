"""The peak of a training step by kind, for what a user would choose between.

A model of L blocks is extrapolated from one of three: each block more keeps as much as the middle one of the three,
and leaves as many gradients behind. The peak is sought in three phases: in the forward pass; in the backward pass,
where all blocks are saved at first and all gradients there at last; and in the optimizer step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from oasis_fx.inspect.nodes import module_path
from oasis_fx.inspect.state_bytes import state_bytes
from oasis_fx.memory.node_costs import saved_storages
from oasis_fx.plan.liveness import Moment, moments
from oasis_fx.plan.trace import FakeModel, Halves

KINDS = ("weights", "gradients", "optimizer", "bases", "activations", "logits", "temporaries")
CHUNKS = 16  # of a cross-entropy that never makes all logits at once


@dataclass(frozen=True)
class Memory:
    """Bytes by kind at the peak of a step, and the phase it is in: forward, backward or optimizer."""

    bytes_of: Mapping[str, int]
    phase: str

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
    """The highest moments of a graph pair: by phase, activations, logits, gradients and temporaries in bytes."""

    forward: Mapping[str, int]
    backward: Mapping[str, int]
    gradients: int  # when the backward pass is done


def peak(states: States, phases: Phases) -> Memory:
    """Return the highest of the three phases."""
    fixed = {"weights": states.weights, "optimizer": states.optimizer, "bases": states.bases}
    candidates = {
        "forward": phases.forward,
        "backward": phases.backward,
        "optimizer": {"gradients": phases.gradients},
    }
    phase = max(candidates, key=lambda name: sum(candidates[name].values()))
    return Memory({kind: fixed.get(kind, 0) + candidates[phase].get(kind, 0) for kind in KINDS}, phase)


def phases(
    three: FakeModel, graphs: Halves, block_gradients: int, blocks: int, vocabulary: int, chunked: bool
) -> Phases:
    """Extrapolate the phases of a model of ``blocks`` blocks.

    Args:
        graphs: of the model of three blocks.
        block_gradients: bytes of the gradients of one block.
    """
    forward, backward = graphs
    static = {node.name for node in forward.find_nodes(op="placeholder")}
    chunks = CHUNKS if chunked else 1
    ahead = moments(forward, static, vocabulary, chunks)
    back = moments(backward, static, vocabulary, chunks)
    gradients = back[-1].returned if back else 0
    more = blocks - 3
    block_saved = saved_bytes(forward, three.trace.num_forward_outputs)[1]
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
    return Phases(
        _with_logits(total_ahead, peak_ahead.wide), _with_logits(rise, top.wide), gradients + more * block_gradients
    )


def saved_bytes(forward: fx.Graph, num_forward_outputs: int) -> tuple[int, int]:
    """Count the bytes that a forward graph of three blocks keeps: all, and those of a block in the mean.

    Under a budget blocks change sides one after another, so that no single one stands for all.
    """
    saved = saved_storages(forward, num_forward_outputs)
    blocks = sum(saved[node.name] for node in forward.nodes if node.name in saved and block_of(node) is not None)
    return sum(saved.values()), blocks // 3


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


def block_of(node: fx.Node) -> int | None:
    """Return the number of the block that a node is from; None of what is around the blocks."""
    found = re.search(r"\.(\d+)\.", f".{module_path(node)}.")
    return int(found[1]) if found else None


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
    total = 0
    for p in trained(model):
        blocked = p.numel() >= 4096 and p.numel() % 256 == 0
        total += 2 * (p.numel() + 4 * p.numel() // 256) if blocked else 2 * p.numel() * p.itemsize
    return States(weight_bytes(model), total)


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


def oasis_states(traced: FakeModel) -> States:
    """Return the states of `OasisAdamW`: moments of m x r, bases of n x r in float32; of other weights AdamW's."""
    ours, stock = state_bytes(traced.record, traced.trace), adam_states(traced.model)
    return replace(stock, optimizer=stock.optimizer - ours.dense_moments + ours.moments, bases=ours.bases)


def extrapolate(two: States, three: States, *, blocks: int) -> States:
    """Extrapolate the states of a model of ``blocks`` blocks."""
    more = blocks - 3
    return replace(
        three,
        weights=three.weights + more * (three.weights - two.weights),
        optimizer=three.optimizer + more * (three.optimizer - two.optimizer),
        bases=three.bases + more * (three.bases - two.bases),
    )
