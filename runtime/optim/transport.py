"""Transport optimizer states from one basis to another: the formulas.

Let R = Q^T Q+ [r, r], with Q the old and Q+ the new basis. A state A [m, r] stands for the matrix A Q^T [m, n].

Source: LDAdam, arXiv 2410.16103, its projection-aware update, in right-projection form. Coordinates count as
uncorrelated with variance v - m^2, which is transported by the squares of R's entries; means are transported by R.
"""

from __future__ import annotations

import torch


def transport_mean(mean: torch.Tensor, overlap: torch.Tensor) -> torch.Tensor:
    """Return means of gradients in the new coordinates, ``m+ = m R`` [L, m, r].

    Args:
        mean: m [L, m, r], in the old coordinates.
        overlap: R [L, r, r].
    """
    return torch.bmm(mean, overlap)


def transport_second_moment(
    second: torch.Tensor, mean: torch.Tensor, overlap: torch.Tensor, bias1: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """Return Adam's second moments in the new coordinates, ``v+ = bias2 * |(v^ - m^^2)(R o R) + (m^ R)^2|`` [L, m, r].

    Here m^ and v^ are the bias-corrected moments, and squares and the product R o R are taken entry by entry.

    Args:
        second, mean: Adam's moments [L, m, r] in the old coordinates, not bias-corrected.
        overlap: R [L, r, r].
        bias1, bias2: ``1 - beta^t`` [L, 1, 1]; 0 before the first step, when the moments are zero.
    """
    tiny = torch.finfo(mean.dtype).tiny
    mean_hat, second_hat = mean / bias1.clamp_min(tiny), second / bias2.clamp_min(tiny)
    variance = second_hat - mean_hat.square()
    # The absolute value guards against variances that rounding made negative.
    return bias2 * (torch.bmm(variance, overlap.square()) + torch.bmm(mean_hat, overlap).square()).abs()


def fit_columns(state: torch.Tensor, columns: int, fill: torch.Tensor | None = None) -> torch.Tensor:
    """Return a state [m, r] as [m, columns]: cut, or extended by copies of ``fill`` [m, 1], by default zeros."""
    missing = columns - state.shape[1]
    if missing <= 0:
        return state[:, :columns].contiguous()
    new = (torch.zeros_like(state[:, :1]) if fill is None else fill).expand(-1, missing)
    return torch.cat([state, new], dim=1)
