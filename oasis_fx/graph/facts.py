"""What the passes know of a graph: weights that are candidates, the nodes that compute their gradients, what is kept.

Symbols, here and in passes/: N tokens, n in_features, m out_features, r rank;
X[N,n] activation, W[m,n] weight, Q[n,r] basis, S[m,r] coordinate slot;
P[N,r] = X Q, G[m,r] = dY^T P, C[n,r] = X^T P.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from oasis_fx.graph.matricization import Features
from oasis_fx.graph.runtime_inputs import RuntimeInputs

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.spec import SubspaceSpec


@dataclass(frozen=True)
class WeightGroup:
    """Weights of one graph that share a basis.

    Attributes:
        weights: their positions among the graph's inputs.
        features: for each of them the dimensions that its matmul sums over.
        spec: what the basis is to be.
    """

    weights: tuple[int, ...]
    features: tuple[Features, ...]
    spec: SubspaceSpec


@dataclass(frozen=True)
class ProjectionRule:
    """What a graph has to know of the rule that chooses its bases; all bases of one graph have one rule.

    Attributes:
        of_gradient: the weight gradient dW is projected, and not the activation X.
        statistic: the graph computes C for the basis.
        dense: the gradient leaves the graph as G Q^T, as the weight's own gradient.
    """

    of_gradient: bool = False
    statistic: bool = True
    dense: bool = False


@dataclass(frozen=True)
class LiftedWeight:
    """One candidate weight and the runtime's inputs for it, by position among the graph's inputs.

    Numbers only: they are part of the compile cache's key, and equal layers must give equal keys.

    Attributes:
        weight: position of W.
        slot: position of S, whose gradient will be G.
        basis: position of Q, whose gradient will be C; weights that read one activation share it.
        energy: position of a scalar beside Q, whose gradient will be ||X||^2; None where that is not wanted.
        features: dimensions of W, from and to, that its matmul sums over: (1, 2) of nn.Linear's [m,n], (0, 1) of
            Conv1D's [n,m], (1, 4) of a convolution's [m,c,h,w], (1, 2) of experts' [e,n,m]. The others are rows.
        tail: position of T, the columns behind those of Q that the weight gradient has coordinates for as well; None
            where Q has no tail.
        control: position of what the operators of `oasis_fx.runtime.gradients.in_graph` are told, where the basis is
            computed from the batch itself; Q is then a stand-in of its shape. None elsewhere.
        rule: how the bases of the graph are chosen.
    """

    weight: int
    slot: int
    basis: int
    energy: int | None
    features: Features
    tail: int | None = None
    control: int | None = None
    rule: ProjectionRule = ProjectionRule()

    @property
    def runtime_inputs(self) -> tuple[int, ...]:
        """The positions of all inputs that the runtime lends for this weight."""
        positions = self.basis, self.tail, self.energy, self.control, self.slot
        return tuple(position for position in positions if position is not None)


@dataclass(frozen=True)
class DynamoFacts:
    """What the passes over a graph of Dynamo find out; they hand it from one to the next.

    Attributes:
        names: names of the graph's parameters of at least two dimensions, by position among its inputs.
        groups: the weights that get a basis, group by group.
        reasons: why the other weights get none, by position.
        layout: where the runtime's inputs stand; None until it is decided, and where there is no group.
        fakes: fake values of the runtime's inputs by name, in order.
        lifted: the weights of all groups as the passes over the joint graph see them.
    """

    names: Mapping[int, str] = field(default_factory=dict)
    groups: tuple[WeightGroup, ...] = ()
    reasons: Mapping[int, str] = field(default_factory=dict)
    layout: RuntimeInputs | None = None
    fakes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lifted: tuple[LiftedWeight, ...] = ()


class Kind(Enum):
    """How a weight gradient is computed from dY and X."""

    MATMUL = "matmul"  # dY [N,m], X [N,n]; or [1,N,..]
    BATCHED = "batched matmul"  # dY [e,N,m], X [e,N,n], one matmul an expert
    GROUPED = "grouped matmul"  # dY [N,m], X [N,n], rows of one expert behind those of another
    CONVOLUTION = "convolution"  # dY [b,m,*], X [b,c,*]


@dataclass(frozen=True)
class Contraction:
    """One matmul ``dY^T X`` within a weight gradient.

    Attributes:
        kind: which operator does it.
        dense: the node that computes it.
        dy: the operand that depends on an incoming gradient; its last two dimensions are swapped if ``dy_transposed``.
        x: the operand that does not; swapped if ``x_transposed``.
    """

    kind: Kind
    dense: fx.Node
    dy: fx.Node
    dy_transposed: bool
    x: fx.Node
    x_transposed: bool


@dataclass(frozen=True)
class WeightGradient:
    """A weight gradient made of contractions.

    Attributes:
        inputs: the weight and the runtime's inputs for it.
        position: where its dense gradient stands among the joint graph's outputs.
        blocks: its blocks of rows, from first to last: one, or one for each part of a weight used in parts. Each is
            the sum of its contractions: one for each use of the weight, none for a part that is not used.
        rows: how many rows of G each block has.
    """

    inputs: LiftedWeight
    position: int
    blocks: tuple[tuple[Contraction, ...], ...]
    rows: tuple[Any, ...]

    @property
    def terms(self) -> tuple[Contraction, ...]:
        """The contractions of all blocks."""
        return tuple(term for block in self.blocks for term in block)


@dataclass(frozen=True)
class Skipped:
    """A weight (position among the graph's inputs) that keeps its dense gradient, and why."""

    weight: int
    reason: str


@dataclass(frozen=True)
class Projection:
    """What takes the place of an activation in its gradient matmul.

    Attributes:
        p: P [N, r] = X Q, or the patches' in the layout of a convolution's result.
        basis: Q [n, r], which takes G back to full size: the runtime's, or what this batch was given.
    """

    p: fx.Node
    basis: fx.Node


@dataclass(frozen=True)
class SavePlan:
    """What a forward graph keeps for its backward graph, and what the backward graph recomputes.

    Attributes:
        kept: nodes whose storage is kept; none is a view or an input.
        recomputed: nodes of the forward pass, views among them, that the backward graph contains.
        num_bytes: size of the storages in ``kept``.
        price: price of ``recomputed``, in the unit of `oasis_fx.memory.recompute_prices`.
    """

    kept: tuple[fx.Node, ...]
    recomputed: tuple[fx.Node, ...]
    num_bytes: int
    price: float


@dataclass(frozen=True)
class JointFacts:
    """What the passes over a joint graph find out; they hand it from one to the next.

    Attributes:
        num_forward_outputs: how many of the graph's outputs the user's forward pass returns.
        lifted: the candidate weights.
        sites: the weight gradients that are rewritten.
        skipped: the weights that keep their dense gradient, with reasons.
        projections: P of each activation, by `oasis_fx.passes.project_activations.projection_key`.
        allowed_bytes: how much the forward graph may keep for the backward graph; None where nothing bounds it.
        plan: what to keep and what to recompute; None where torch decides.
        halves: the forward and the backward graph; None until the graph is split.
    """

    num_forward_outputs: int
    lifted: tuple[LiftedWeight, ...] = ()
    sites: tuple[WeightGradient, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    projections: Mapping[Hashable, Projection] = field(default_factory=dict)
    allowed_bytes: int | None = None
    plan: SavePlan | None = None
    halves: tuple[fx.GraphModule, fx.GraphModule] | None = None
