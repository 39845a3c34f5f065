"""Settings of a parameter group: checked when given, when loaded, and at each step, before any work."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch


def check_numbers(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError for a setting that is not a finite number from 0; ``lr`` may be a one-element tensor."""
    for name in names:
        value = as_number(group[name], tensors=name == "lr")
        if value is None or not 0 <= value < math.inf:  # false for NaN too
            also = " (or a one-element tensor of one)" if name == "lr" else ""
            raise ValueError(f"{name} is {group[name]!r}: it must be a finite number from 0{also}")


def check_decays(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``betas`` are not two numbers in [0, 1), or one-element tensors of such."""
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(_is_decay(b, tensors=True) for b in betas):
        raise ValueError(f"betas is {betas!r}: it must be two numbers in [0, 1)")


def check_momentum(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``momentum`` is not a number in [0, 1)."""
    if not _is_decay(group["momentum"]):
        raise ValueError(f"momentum is {group['momentum']!r}: it must be a number in [0, 1)")


def check_limit(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``limit`` is not a number over 1."""
    limit = as_number(group["limit"])
    if limit is None or not limit > 1:
        raise ValueError(f"limit is {group['limit']!r}: it must be a number over 1 (inf: no limit)")


def check_rounding(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``stochastic_rounding`` is neither None nor a bool."""
    value = group["stochastic_rounding"]
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"stochastic_rounding is {value!r}: it must be None, True or False")


def check_flags(group: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError for a setting that is given and no bool."""
    for name in names:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"{name} is {group[name]!r}: it must be True or False")


def check_bits(group: Mapping[str, Any]) -> None:
    """Raise ValueError where ``state_bits`` is given and neither 8 nor 32."""
    bits = group.get("state_bits", 32)
    if not isinstance(bits, int) or bits not in (8, 32):
        raise ValueError(f"state_bits is {bits!r}: it must be 8 or 32")


def rounds_stochastically(group: Mapping[str, Any], weight: torch.Tensor) -> bool:
    """Whether a weight's updates are rounded at random: bfloat16 ones are, unless the group says no."""
    return weight.dtype == torch.bfloat16 and group["stochastic_rounding"] is not False


def _is_decay(value: object, *, tensors: bool = False) -> bool:
    number = as_number(value, tensors=tensors)
    return number is not None and 0 <= number < 1


def as_number(value: object, *, tensors: bool = False) -> float | None:
    """A real number as a float; None for what is none, be it a text that Python would make a number of.

    Args:
        tensors: whether a tensor of one element is a number.
    """
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if tensors and value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
