"""The layouts of matrices in memory that kernels step."""

from __future__ import annotations

import torch


def row_stride(matrix: torch.Tensor) -> tuple[bool, int] | None:
    """Return how a matrix [m, n] lies in memory, or None where it is neither a contiguous nor a turned one.

    Returns:
        Whether it is turned, of strides (1, ...), and the stride of its rows, or of its columns where it is.
    """
    (m, n), (down, right) = matrix.shape, matrix.stride()
    if (right == 1 or n == 1) and (down >= n or m == 1):
        return False, max(down, n)
    if (down == 1 or m == 1) and (right >= m or n == 1):
        return True, max(right, m)
    return None
