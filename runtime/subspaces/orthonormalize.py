"""Orthonormalise the columns of batches of tall matrices: Q of their QR factorisation, R with a positive diagonal.

With a positive diagonal, Q stays near a matrix that is nearly orthonormal. It is computed by Cholesky-QR, applied
twice: two Gram matrices, two small Cholesky factors, two small inverses, all batched. No decision is taken on the host,
so an optimizer step waits for no device.

A Gram matrix that rounding has left indefinite, as of a matrix whose largest singular value is thousands of times the
smallest, is factorised with a small multiple of I added to it; the second round makes up for that.

Source: Fukaya et al., CholeskyQR2 (ScalA 2014), and shifted CholeskyQR (arXiv 1809.11085).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oasis_fx._torch.precision import whole_float32_products
from oasis_fx.runtime.subspaces import host_reads


@dataclass(frozen=True)
class Orthonormalized:
    """What became of a batch of matrices [L, n, r].

    Attributes:
        q: Q [L, n, r], of the dtype of the matrices; where ``done`` is false it means nothing.
        done: bool [L]: whether max |Q^T Q - I| is at most 1e-5 (float32) or 1e-12 (float64).
        condition: of the first Cholesky factor [L]: its largest diagonal entry over its smallest.
    """

    q: torch.Tensor
    done: torch.Tensor
    condition: torch.Tensor


def orthonormalize(a: torch.Tensor) -> torch.Tensor:
    """Return orthonormal columns for any matrices, also where their columns are not independent.

    Where Cholesky-QR fails, Householder QR takes its place and completes a deficient rank. The host waits for the
    device once.

    Args:
        a: [L, n, r] with r <= n, float32 or float64, finite; of any scale, rank-deficient or zero too.

    Returns:
        Q [L, n, r] of the dtype of ``a``, with max |Q^T Q - I| at most 1e-5 (float32) or 1e-12 (float64).
    """
    (found,) = cholesky_orthonormalize([a])
    if bool(found.done.all()):
        return found.q
    failed = ~found.done
    q = found.q.clone()
    q[failed] = _householder(_scaled(a[failed]))
    return q


def cholesky_orthonormalize(batches: Sequence[torch.Tensor]) -> list[Orthonormalized]:
    """Orthonormalise matrices of full rank; report those that are nearly of a smaller rank as not done.

    The small factors of all batches are computed together, since a GPU takes as long for a few as for many.

    Args:
        batches: [L, n, r] each, at least one, with r <= n; of one r, dtype (float32 or float64) and device; finite.

    Returns:
        One result for each batch, in order.
    """
    with whole_float32_products(batches[0].device.type):
        scaled = [_scaled(a) for a in batches]
        once, failed_once, condition = _cholesky_qr(scaled, shift=_SHIFT)
        twice, failed_twice, _ = _cholesky_qr(once)
        tolerance = 1e-5 if batches[0].dtype == torch.float32 else 1e-12
        gram = torch.cat([_gram(q) for q in twice])
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        defect = (gram - eye).abs().amax(dim=(-2, -1))
        done = ~(failed_once | failed_twice) & (defect <= tolerance)  # false for NaN
    lengths = [len(a) for a in batches]
    columns = zip(twice, torch.split(done, lengths), torch.split(condition, lengths), strict=True)
    return [Orthonormalized(q, of_batch, its_condition) for q, of_batch, its_condition in columns]


def _scaled(a: torch.Tensor) -> torch.Tensor:
    """Divide by the largest entry, so that the squares that a Gram matrix sums stay within the range of exponents."""
    return a / a.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)


# In units of the last digit of a Gram matrix's trace, of which rounding loses less. For the `Oja` step of rank 1024,
# whose smallest singular value is 1, it is about 10, so that the second round meets a condition of 3.
_SHIFT = 10.0


def _cholesky_qr(
    batches: Sequence[torch.Tensor], shift: float = 0.0
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    gram = torch.cat([_gram(a) for a in batches])
    factor, info = torch.linalg.cholesky_ex(gram)
    # Where the verdicts can be read for nothing, nothing is computed that no matrix needs.
    if shift and not (host_reads.reads_are_free(gram.device) and not bool(info.any())):
        factor, info = _with_shift(gram, factor, info, shift)
    # The small triangle is inverted and multiplied with: on a 2-core CPU 30 times faster than a triangular
    # solve with n right-hand sides, and what it costs in accuracy the second round makes good.
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    condition = diagonal.amax(dim=-1) / diagonal.amin(dim=-1)
    inverse = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
    parts = inverse.split([len(a) for a in batches])
    return [torch.bmm(a, part) for a, part in zip(batches, parts, strict=True)], info != 0, condition


def _with_shift(
    gram: torch.Tensor, factor: torch.Tensor, info: torch.Tensor, shift: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Cholesky factors and verdicts, where one failed those of its matrix with a multiple of I added."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    added = torch.where(info != 0, shift * torch.finfo(gram.dtype).eps * trace, 0.0)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    again, verdicts = torch.linalg.cholesky_ex(gram + added.view(-1, 1, 1) * eye)
    failed = info != 0
    return torch.where(failed.view(-1, 1, 1), again, factor), torch.where(failed, verdicts, info)


# A GPU has this many multiprocessors or more, each of which wants a block of a Gram matrix to compute.
_BUSY = 128
_GRAM_BLOCK = 64


def _gram(a: torch.Tensor) -> torch.Tensor:
    """Return A^T A [L, r, r].

    On a GPU a Gram matrix is a few blocks, each a sum over all n rows that one multiprocessor computes. So the rows are
    split, as far as there are multiprocessors, and the parts of the sum are added: 0.07 ms in place of 0.26 for four
    matrices of 14336 x 128 on an H200 (benchmarks/results/gpu).
    """
    if a.device.type != "cuda":
        return torch.bmm(a.mT, a)
    length, n, r = a.shape
    blocks = length * (-(-r // _GRAM_BLOCK)) ** 2
    splits = 1
    while blocks * splits < _BUSY and n % (2 * splits) == 0 and n // (2 * splits) >= 4 * r:
        splits *= 2
    parts = a.reshape(length * splits, n // splits, r)
    return torch.bmm(parts.mT, parts).view(length, splits, r, r).sum(dim=1)


def _householder(a: torch.Tensor) -> torch.Tensor:
    q, r = torch.linalg.qr(a)
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return q * signs.unsqueeze(-2)
