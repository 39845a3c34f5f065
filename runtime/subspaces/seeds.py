"""Make random numbers that are equal on all devices and ranks, and in a resumed run."""

from __future__ import annotations

import torch


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU, seeded by whole numbers (at least one) in their order, and by nothing else."""
    seed = numbers[0]
    for number in numbers[1:]:
        seed = seed * 1_000_003 + number
    return torch.Generator("cpu").manual_seed(seed)
