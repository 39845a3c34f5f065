"""What the passes know of a joint graph: the weights that are candidates, and the nodes that compute their gradients.

Symbols, here and in passes/: N tokens, n in_features, m out_features, r rank;
X[N,n] activation, W[m,n] weight, Q[n,r] basis, S[m,r] coordinate slot;
P[N,r] = X Q, G[m,r] = dY^T P, C[n,r] = X^T P.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import fx


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
        of_gradient: project dW, and not X.
        statistic: whether the graph computes C for the basis.
        control: position of what the operators of `oasis_fx.runtime.gradients.in_graph` are told, where the basis is
            computed from the batch itself; Q is then a stand-in of its shape. None elsewhere.
        dense: whether the gradient leaves the graph as G Q^T, in the weight's own slot.
    """

    weight: int
    slot: int
    basis: int
    energy: int | None
    features: tuple[int, int]
    of_gradient: bool = False
    statistic: bool = True
    control: int | None = None
    dense: bool = False

    def rows(self, num_dims: int) -> tuple[int, ...]:
        """The dimensions of W that are rows of S, in order."""
        return *range(self.features[0]), *range(self.features[1], num_dims)


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
        return tuple(term for block in self.blocks for term in block)


@dataclass(frozen=True)
class Skipped:
    """A weight (position among the graph's inputs) that keeps its dense gradient, and why."""

    weight: int
    reason: str
