"""What an optimizer step does, as kernels: bytes, FLOPs, instructions and launches.

Of our own step the passes over tensors are counted in the code for float32 states; what the counts stand for is beside
them. They are of a step of `OasisAdamW` with the rule `Oja` in which all bases move. Launches are those of an H200
(``benchmarks/results/gpu/2026-11-27-after/optimizer_step.json``); their number does not depend on a model's depth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch

from oasis_fx._torch.joint_graphs import input_placeholders
from oasis_fx.graph.edits import shape, value
from oasis_fx.inspect.state_bytes import sites_by_basis
from oasis_fx.memory.node_costs import hint
from oasis_fx.plan.kernels import Kernel, Kind
from oasis_fx.plan.memory import trained
from oasis_fx.plan.trace import FakeModel
from oasis_fx.runtime.optim.chunks import CHUNK

# Tensors of m x r that a step reads or writes: the search for what is not finite (1), the gradient in float32 (2),
# U = 0 (1), AdamW on it (7), U scaled and rounded (2), and the transport of both moments (34).
_STATE_PASSES = 47
# The same of n x r: the step along C (20), Cholesky-QR twice (7), the checks of the result (4), and what is noted of
# the move (12).
_BASIS_PASSES = 43
_BASIS_PRODUCTS = 6  # of n x r by r x r: three Gram matrices, two by a triangle, the overlap
_STATE_PRODUCTS = 3  # of m x r by r x r: both moments, and the squares of the first
# A tail's share, of m x t, of m x r beside it, and likewise of n x t and n x r: norms of rows, the direction along the
# tail, [U, G'] and [Q, T]; what of random columns lies outside of the basis, their Cholesky-QR and its check.
_TAIL_PASSES = (13, 6, 34, 12)
_TAIL_BASIS_PRODUCTS = (6, 5)  # of n x r by r x t, and of n x t by t x t
_LAUNCHES = 440
_TAIL_LAUNCHES = 220  # the operators that a tail adds to a step (tests/runtime/optim/test_step_operators.py)
# What a step in eight bits adds, in bytes a number of a moment and operators a chunk of `CHUNK` of them: both moments
# are decoded and encoded, those of a subspace a second time for their transport (tests/plan/test_eight_bits.py).
_EIGHT_BITS = (154, 32)
_EIGHT_BITS_LOW_RANK = (308, 64)
_ADAMW_FLOPS = 30  # of an element, its root and division among them
_ELEMENTS_A_LAUNCH = 20_000_000  # of torch's fused kernels: 320 blocks of 65536


def adamw_work(parameters: Iterable[torch.Tensor]) -> list[Kernel]:
    """Return the work of torch's fused AdamW: weights and both moments are read and written, gradients read."""
    return [_adamw(count, dtype) for dtype, count in _elements(parameters).items()]


def adam8bit_work(parameters: Iterable[torch.Tensor]) -> list[Kernel]:
    """Return the work of torchao's 8-bit AdamW: moments have a byte an element, and a kernel steps one weight."""
    return [
        Kernel("8-bit AdamW", Kind.ADAMW, p.dtype, 2.0 * _ADAMW_FLOPS * p.numel(), p.numel() * (3 * p.itemsize + 4))
        for p in parameters
    ]


def galore_work(model: torch.nn.Module, names: Collection[str], rank: int) -> list[Kernel]:
    """Return the work of GaLore on the weights that we would rewrite, without the SVD of every 200th step.

    The gradient is projected, AdamW steps r rows, and its direction is projected back and added to the weight.
    """
    found, dense = [], []
    for name, p in model.named_parameters():
        if name in names and p.dim() == 2:
            short, long = sorted(p.shape)
            r = min(rank, short)
            product = Kernel("projection", Kind.MATMUL, p.dtype, 2.0 * p.numel() * r, p.nbytes + r * long * p.itemsize)
            added = Kernel("weights", Kind.FUSED, torch.float32, p.numel(), 3.0 * p.nbytes)
            found += [product, product, _adamw(r * long, p.dtype), added]
        else:
            dense.append(p)
    return [*found, *adamw_work(dense)]


def oasis_work(traced: FakeModel, bits: int = 32) -> list[Kernel]:
    """Return the work of `OasisAdamW`: of dense weights as AdamW's, for the rest `low_rank_work` and `tail_work`.

    Args:
        bits: 8 where the moments are kept in eight bits, which are decoded and encoded again.
    """
    placeholders = input_placeholders(traced.trace.before.graph)
    dense = _elements(trained(traced.model))
    weights, bases, tails = [], [], []
    for basis, sites in sites_by_basis(traced.trace).items():
        n, r = (hint(size) for size in shape(placeholders[basis]))
        bases.append((n, r))
        tail = sites[0].inputs.tail
        t = 0 if tail is None else hint(shape(placeholders[tail])[1])
        for site in sites:
            weight = value(placeholders[site.inputs.weight])
            dense[weight.dtype] -= weight.numel()
            weights.append((weight.numel() // n, n, r, weight.dtype))
        if t:
            tails.append((n, r, t, [(m, dtype) for m, _, _, dtype in weights[-len(sites) :]]))
    of_tails = tail_work(tails) if tails else []
    found = [*(_adamw(count, dtype) for dtype, count in dense.items()), *low_rank_work(weights, bases), *of_tails]
    if bits == 8:
        states = [m * r for m, _, r, _ in weights]
        found.append(eight_bit_work(sum(dense.values()), sum(states)))
    return found


def eight_bit_work(dense: int, low_rank: int) -> Kernel:
    """Return what states in eight bits add to a step. Small moments count as if they were kept in eight bits as well.

    Args:
        dense: numbers of all dense weights together.
        low_rank: numbers in a moment of all weights in subspaces together.
    """
    moved, launches = 0.0, 0
    for numbers, (each, operators) in ((dense, _EIGHT_BITS), (low_rank, _EIGHT_BITS_LOW_RANK)):
        moved += each * numbers
        launches += operators * -(-numbers // CHUNK)
    return Kernel("states in eight bits", Kind.FUSED, torch.float32, 0.0, moved, launches=launches)


def low_rank_work(
    weights: Sequence[tuple[int, int, int, torch.dtype]], bases: Sequence[tuple[int, int]]
) -> list[Kernel]:
    """Return the work of a step in which low-rank weights are stepped, their bases move and their states follow.

    Args:
        weights: m, n, r and dtype of each.
        bases: n and r of each.
    """
    steps = [
        Kernel(
            "low-rank weights", Kind.LOW_RANK_WEIGHTS, dtype, 2.0 * m * n * r, 2.0 * m * n * dtype.itemsize,
            instructions=m * n * instructions_of(r), launches=0,
        )
        for m, n, r, dtype in weights
    ]  # fmt: skip
    wide = torch.float32
    states = sum(m * r for m, _, r, _ in weights)
    moved = sum(n * r for n, r in bases)
    passes = 4.0 * (_STATE_PASSES * states + _BASIS_PASSES * moved)
    products = 2.0 * sum(_STATE_PRODUCTS * m * r * r for m, _, r, _ in weights)
    products += 2.0 * sum(_BASIS_PRODUCTS * n * r * r for n, r in bases)
    return [
        *steps,
        Kernel("states and bases", Kind.FUSED, wide, 0.0, passes, launches=_LAUNCHES),
        Kernel("products of states and bases", Kind.MATMUL, wide, products, 0.0, launches=0),
    ]


def tail_work(tails: Sequence[tuple[int, int, int, Sequence[tuple[int, torch.dtype]]]]) -> list[Kernel]:
    """Return what tails add to a step: they are drawn, and weights are stepped along them.

    Args:
        tails: n, r and t of each, with m and dtype of the weights whose basis it stands beside.
    """
    passes = products = 0.0
    steps = []
    for n, r, t, weights in tails:
        rows = sum(m for m, _ in weights)
        passes += 4.0 * sum(a * b for a, b in zip(_TAIL_PASSES, (rows * t, rows * r, n * t, n * r), strict=True))
        products += 2.0 * n * t * (_TAIL_BASIS_PRODUCTS[0] * r + _TAIL_BASIS_PRODUCTS[1] * t)
        for m, dtype in weights:
            more = instructions_of(r + t) - instructions_of(r)
            kind = Kind.LOW_RANK_WEIGHTS
            steps.append(
                Kernel("weights, tail", kind, dtype, 2.0 * m * n * t, 0.0, instructions=m * n * more, launches=0)
            )
    wide = torch.float32
    return [
        *steps,
        Kernel("tails", Kind.FUSED, wide, 0.0, passes, launches=_TAIL_LAUNCHES),
        Kernel("products of tails", Kind.MATMUL, wide, products, 0.0, launches=0),
    ]


def instructions_of(rank: int) -> float:
    """Return how many instructions the kernel for low-rank weights executes an entry.

    A line through what is counted in the machine code of a bfloat16 kernel for sm_90: 17.4 at r = 32, 19.5 at r = 128
    (docs/performance.md, "On a GPU").
    """
    return 17.4 + (rank - 32) * (19.5 - 17.4) / (128 - 32)


def _elements(parameters: Iterable[torch.Tensor]) -> dict[torch.dtype, int]:
    """How many elements of each dtype there are."""
    found: dict[torch.dtype, int] = {}
    for p in parameters:
        found[p.dtype] = found.get(p.dtype, 0) + p.numel()
    return found


def _adamw(elements: int, dtype: torch.dtype) -> Kernel:
    flops, size = float(_ADAMW_FLOPS * elements), 7.0 * elements * dtype.itemsize
    return Kernel("AdamW", Kind.ADAMW, dtype, flops, size, launches=math.ceil(elements / _ELEMENTS_A_LAUNCH))
