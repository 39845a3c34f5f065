"""Find the step size of a basis during training: ``Oja(lr="auto")``.

A basis that follows its activation is a filter: each batch shows the subspace with noise, and the step size says how
far one batch is believed. In a filter with the right gain, successive corrections are uncorrelated (Kailath 1968: the
innovations of a Kalman filter are white). Where they point the same way, the basis lags behind: the step is too small.
Where each takes the one before back, the basis follows noise: the step is too large. So, with D the move of a basis and
corr the cosine between two successive ones,

    log eta = log eta + gain * corr(D, D_before),   eta within LOWEST to HIGHEST

D is remembered as a sketch of `SKETCH_ROWS` random combinations of its rows, so that no second basis has to be kept;
the cosine of r columns of a sketch has a standard error of 1 / sqrt(SKETCH_ROWS r) around that of the moves.

The method is ours: the paper of OASIS names an adaptive rate as future work.
"""

from __future__ import annotations

import math

import torch

from oasis_fx.runtime.subspaces.seeds import generator_of

SKETCH_ROWS = 16
GAIN = 0.3
LOWEST, HIGHEST = 1e-3, 100.0


def sketch(move: torch.Tensor) -> torch.Tensor:
    """Return `SKETCH_ROWS` random combinations of the rows of each move [L, n, r], as [L, SKETCH_ROWS, r].

    The signs of a combination depend on n alone, so they are the same at every step and on every device and rank.
    """
    n = move.shape[-2]
    signs = torch.randint(0, 2, (SKETCH_ROWS, n), generator=generator_of(n), device="cpu") * 2 - 1
    return signs.to(move) @ move / math.sqrt(SKETCH_ROWS)


def next_log_rate(log_rate: torch.Tensor, move: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the new logarithms of step sizes [L]; one stays as it was where either of its moves is zero.

    Args:
        log_rate: logarithms of the present step sizes [L].
        move, before: sketches [L, SKETCH_ROWS, r] of the last move and of the one before it.
    """
    product = (move * before).sum(dim=(-2, -1))
    norms = torch.linalg.vector_norm(move, dim=(-2, -1)) * torch.linalg.vector_norm(before, dim=(-2, -1))
    cosine = torch.where(norms > 0, product / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    changed = (log_rate + GAIN * torch.nan_to_num(cosine)).clamp(math.log(LOWEST), math.log(HIGHEST))
    return torch.where(cosine.isfinite(), changed, log_rate)
