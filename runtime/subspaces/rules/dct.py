"""Columns of a fixed transform: the discrete cosine transform, the r of its columns that hold most.

    S = A D,  D the orthonormal DCT-II [n, n];   Q+ = the r columns of D with the largest ||S[:, j]||

Of all sets of r columns of a fixed orthonormal D it is the one that loses least. D is the same for all layers and is
never laid out; r integers are stored in place of a basis. Moments are carried over exactly: R = Q^T Q+ picks columns.

Source: Trion and DCT-AdamW, arXiv 2505.17967, there on gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from oasis_fx.runtime.subspaces.rules.base import BatchRule, Side

if TYPE_CHECKING:
    from oasis_fx.runtime.subspaces.subspace import Subspace


@dataclass(frozen=True)
class DCT(BatchRule):
    """Trion and DCT-AdamW: columns of the discrete cosine transform. Its code are the chosen ones, in rising order.

    Args:
        side: what is projected, ``"activation"`` or ``"gradient"``.
        every: optimizer steps between two moves of a basis, from 1 (the default).

    Raises:
        ValueError: ``side`` is neither, or ``every`` is out of range.
    """

    side: Side = "activation"

    name: ClassVar[str] = "dct"
    coded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("activation", "gradient"):
            raise ValueError(f"side is {self.side!r}: it must be 'activation' or 'gradient'")

    @property
    def on(self) -> Side:
        return self.side

    def first_code(self, r: int, seed: int) -> torch.Tensor:
        return torch.arange(r, device="cpu")

    def expand(self, code: torch.Tensor, n: int, r: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        rows = torch.arange(n, dtype=torch.float64, device="cpu")[:, None] * 2 + 1
        columns = torch.cos(math.pi / (2 * n) * rows * code) * math.sqrt(2 / n)
        columns[:, code == 0] *= math.sqrt(0.5)
        return columns.to(device=device, dtype=dtype)

    def choose(self, batch: torch.Tensor, subspace: Subspace, generator: torch.Generator) -> torch.Tensor:
        energy = dct(batch / batch.abs().amax()).square().sum(dim=0)  # squares could leave the exponent range
        return energy.topk(subspace.shape[1]).indices.sort().values.cpu()


def dct(a: torch.Tensor) -> torch.Tensor:
    """Compute ``a @ D`` [k, n] for the orthonormal DCT-II, by a Fourier transform of length n (Makhoul 1980)."""
    n = a.shape[-1]
    folded = torch.cat([a[..., ::2], a[..., 1::2].flip(-1)], dim=-1)
    turn = torch.exp(-1j * math.pi / (2 * n) * torch.arange(n, dtype=torch.float64, device=a.device))
    transformed = (torch.fft.fft(folded) * turn.to(torch.promote_types(a.dtype, torch.complex64))).real
    scale = torch.full((n,), math.sqrt(2 / n), dtype=a.dtype, device=a.device)
    scale[0] = math.sqrt(1 / n)
    return transformed * scale
