"""Tells ranks that train alike from ranks that do not, by two numbers that travel with the gradients.

A sum over ranks of gradients of different weights, or in different bases, would be a number like any other. So every
rank makes a fingerprint of what it sends, the fingerprints are averaged with the gradients, and a rank whose own is not
the average knows that it is not alone in what it did.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from oasis_fx.runtime.subspaces.subspace import Subspace

_SIGNATURES_DIFFER = 1e-6  # between whole numbers, whose mean over ranks is rounded
_BASES_DIFFER = 1e-4  # between sums over the entries of all bases, whose columns have length 1


class Agreement:
    """What one rank sends in one backward pass, in the order in which it sends it."""

    def __init__(self) -> None:
        self._checksum = 0

    def sign(self, number: int, values: torch.Tensor, subspace: Subspace | None) -> None:
        """Note that a gradient is sent.

        Args:
            number: the weight's place among those of the model.
            values: what is sent: a factor [m, r], or a dense gradient in the weight's shape.
            subspace: the one whose basis the factor is in. None: the gradient is dense.
        """
        basis = 0 if subspace is None else 1
        if subspace is not None and subspace.code is not None:  # all of the basis, and on the CPU
            basis = 2 + zlib.crc32(subspace.code.numpy().tobytes())
        signature = repr((number, tuple(values.shape), values.dtype, basis))
        self._checksum = zlib.crc32(signature.encode(), self._checksum)

    def fingerprint(self, subspaces: Sequence[Subspace], device: torch.device) -> torch.Tensor:
        """Return what all ranks must have alike, float64 [2]: which weights have which gradients, and the
        bases with their tails.
        """
        signature = torch.tensor([float(self._checksum % 2**20)], dtype=torch.float64, device=device)
        stored = (tensor for s in subspaces if s.code is None for tensor in (s.basis, s.tail) if tensor is not None)
        sums = [tensor.detach().sum(dtype=torch.float64).view(1) for tensor in stored]
        bases = torch.cat(sums).sum(dim=0, keepdim=True) if sums else torch.zeros_like(signature)
        return torch.cat([signature, bases.to(device)])


def check_agreement(own: torch.Tensor, mean: torch.Tensor, subspaces: Sequence[Subspace]) -> None:
    """Compare a rank's own fingerprint with the mean over all ranks.

    Raises:
        RuntimeError: ranks have gradients of different weights, or bases that differ.
    """
    apart = (own - mean).abs()
    # Bases may differ by rounding on unlike devices.
    limits = torch.tensor([_SIGNATURES_DIFFER, _BASES_DIFFER], dtype=apart.dtype, device=apart.device)
    if bool((apart <= limits).all()):  # false for NaN
        return
    if not float(apart[0]) <= _SIGNATURES_DIFFER:
        raise RuntimeError(
            "ranks do not agree on which weights have which gradients: the same model, settings, seeds and "
            "used weights are needed on all of them"
        )
    names = "; ".join(subspace.spoken_name for subspace in subspaces)
    raise RuntimeError(
        f"the bases of {names[:500]} are not the same on all ranks: every rank has to take the same steps, with "
        "one optimizer that has all of these weights, and to load the same checkpoint"
    )
