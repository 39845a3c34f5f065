"""Make random numbers that are equal on all ranks and in a resumed run."""

from __future__ import annotations

import torch


def generator_of(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator that is seeded by whole numbers (at least one) in their order, and by nothing else.

    Args:
        device: that it draws on. Kinds of devices differ in the numbers that they draw.
    """
    seed = numbers[0]
    for number in numbers[1:]:
        seed = seed * 1_000_003 + number
    return torch.Generator(device).manual_seed(seed)
