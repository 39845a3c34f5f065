"""Settings of a parameter group: checked when given, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def check_numbers(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError for a setting that is not a number from 0; ``lr`` may be a one-element tensor."""
    for name in names:
        value = group[name]
        if isinstance(value, torch.Tensor) and (name != "lr" or value.numel() != 1):
            raise ValueError(f"{name} is {value!r}: it must be a number from 0 (lr may be a one-element tensor)")
        if not float(value) >= 0:  # false for NaN too
            raise ValueError(f"{name} is {value!r}: it must be a number from 0")


def check_decays(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``betas`` are not two numbers in [0, 1)."""
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(0 <= float(b) < 1 for b in betas):
        raise ValueError(f"betas is {betas!r}: it must be two numbers in [0, 1)")


def check_rounding(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``stochastic_rounding`` is neither None nor a bool."""
    if group["stochastic_rounding"] not in (None, True, False):
        raise ValueError(f"stochastic_rounding is {group['stochastic_rounding']!r}: it must be None, True or False")


def check_flags(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError for a setting that is given and no bool."""
    for name in names:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"{name} is {group[name]!r}: it must be True or False")


def rounds_stochastically(group: Mapping[str, Any], weight: torch.Tensor) -> bool:
    """Whether a weight's updates are rounded at random: bfloat16 ones are, unless the group says no."""
    return weight.dtype == torch.bfloat16 and group["stochastic_rounding"] is not False
