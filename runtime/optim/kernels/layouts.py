"""Tell the layouts of matrices in memory that kernels can step."""

from __future__ import annotations

import torch


def row_stride(matrix: torch.Tensor) -> tuple[bool, int] | None:
    """Return how a matrix [m, n] lies in memory: by rows, or turned, by columns.

    Returns:
        Whether it is turned, and the stride between its rows, or between its columns where it is turned. None where
        the entries of neither its rows nor its columns lie side by side.
    """
    (m, n), (down, right) = matrix.shape, matrix.stride()
    if (right == 1 or n == 1) and (down >= n or m == 1):
        return False, max(down, n)
    if (down == 1 or m == 1) and (right >= m or n == 1):
        return True, max(right, m)
    return None
