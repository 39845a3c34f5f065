"""Carry optimizer states from one basis to the next.

With R = Q^T Q+ [r, r], Q the old and Q+ the new basis; a state A [m, r] stands for A Q^T [m, n].

Source: LDAdam, arXiv 2410.16103, its projection-aware update, in right-projection form. Coordinates count as
uncorrelated with variance v - m^2, which goes over by the squares of R's entries; means go over by R.
"""

from __future__ import annotations

import torch


def transport_mean(mean: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """``m+ = m R``: [L, m, r] and [L, r, r] to [L, m, r]."""
    return mean @ overlap


def transport_second_moment(
    second: torch.Tensor, mean: torch.Tensor, overlap: torch.Tensor, bias1: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """``v+ = bias2 * |(v^ - m^2)(R o R) + (m^ R)^2|`` with hats bias-corrected and R o R elementwise.

    Args:
        second, mean: Adam's moments [L, m, r] in the old coordinates, not bias-corrected.
        overlap: R [L, r, r].
        bias1, bias2: ``1 - beta^t`` [L, 1, 1]; 0 before the first step, when the moments are zero.
    """
    mean_hat = mean / torch.where(bias1 > 0, bias1, 1.0)
    second_hat = second / torch.where(bias2 > 0, bias2, 1.0)
    variance = second_hat - mean_hat.square()
    # The absolute value guards against variances that rounding made negative.
    return bias2 * (variance @ overlap.square() + (mean_hat @ overlap).square()).abs()
