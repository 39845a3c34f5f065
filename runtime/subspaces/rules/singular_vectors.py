"""The subspace that captures most of a batch, for rules that choose it from the batch itself."""

from __future__ import annotations

import torch


def top_right_singular_vectors(a: torch.Tensor, r: int) -> torch.Tensor:
    """Compute the orthonormal [n, r] that spans the rows of ``a`` [k, n] best; columns by falling singular value.

    The largest entry of each column is positive. Where k < r, the columns are completed to an orthonormal basis.

    Args:
        a: finite, float32 or float64.
        r: columns, from 1 to n.
    """
    if a.shape[0] > 2 * a.shape[1]:  # many tokens: the eigenvectors of the small Gram matrix, in float64
        wide = a.double()
        vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors.flip(-1)[:, :r].to(a.dtype)
    else:
        vectors = torch.linalg.svd(a, full_matrices=a.shape[0] < r).Vh[:r].mT
    peaks = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(peaks < 0, -1.0, 1.0).to(vectors.dtype)
