"""Rounding to bfloat16 that is right on average, so that updates smaller than half a step are not lost."""

from __future__ import annotations

import torch


def round_stochastically_(target: torch.Tensor, source: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Write ``source`` (float32) to ``target`` (bfloat16), up or down with the odds of the distance.

    A value that bfloat16 holds exactly stays as it is; so do infinities and NaN.
    """
    # bfloat16 is the upper half of float32: add noise below the cut, then cut.
    bits = source.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, source.shape, dtype=torch.int32, device=source.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    target.copy_(torch.where(source.isfinite(), rounded, source))
