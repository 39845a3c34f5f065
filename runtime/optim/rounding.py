"""Round to bfloat16 stochastically: right on average, so that updates smaller than half a step are not lost."""

from __future__ import annotations

import torch

from oasis_fx.runtime.subspaces import host_reads


def round_stochastically_(target: torch.Tensor, source: torch.Tensor, generator: torch.Generator | None = None) -> None:
    """Write ``source`` into ``target``, rounded up or down at random so that the result is right on average.

    Of the two neighbours in bfloat16, the nearer one is the likelier. A value that bfloat16 holds exactly stays as it
    is; so do infinities and NaN.

    Args:
        target: bfloat16, overwritten in place.
        source: float32, of the same shape and device.
        generator: of that device; None for torch's default one.
    """
    # bfloat16 is the upper half of float32: add noise below the cut, then cut.
    bits = source.contiguous().view(torch.int32)
    noise = _sixteen_bits(source.numel(), source.device, generator).view(source.shape)
    rounded = (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    nan = source.isnan()  # its bits may carry over into another number; infinities cannot
    if not host_reads.reads_are_free(source.device) or bool(nan.any()):
        rounded = torch.where(nan, source, rounded)
    target.copy_(rounded)


def _sixteen_bits(count: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """Return random numbers from 0 to 65535, int32 [count]; each word that the generator makes gives four."""
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    words.random_(-(1 << 63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
