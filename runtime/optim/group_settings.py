"""Settings of a parameter group: checked when they are given, when they are loaded, and at the start of every step."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from oasis_fx.runtime.subspaces import host_reads


def check_numbers(group: Mapping[str, Any], *names: str) -> None:
    """Check that settings are finite numbers from 0; ``lr`` may be a one-element tensor, of any value on a GPU.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name in names:
        if name == "lr" and is_on_device(group[name]):
            continue  # it would have to be read
        value = as_number(group[name], tensors=name == "lr")
        if value is None or not 0 <= value < math.inf:  # false for NaN too
            also = " (or a one-element tensor of one)" if name == "lr" else ""
            raise ValueError(f"{name} is {group[name]!r}: it must be a finite number from 0{also}")


def check_decays(group: Mapping[str, Any]) -> None:
    """Check that ``betas`` is two numbers in [0, 1), or two one-element tensors of such numbers.

    Raises:
        ValueError: naming the setting and its value.
    """
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(_is_decay(b, tensors=True) for b in betas):
        raise ValueError(f"betas is {betas!r}: it must be two numbers in [0, 1)")


def check_momentum(group: Mapping[str, Any]) -> None:
    """Check that ``momentum`` is a number in [0, 1).

    Raises:
        ValueError: naming the setting and its value.
    """
    if not _is_decay(group["momentum"]):
        raise ValueError(f"momentum is {group['momentum']!r}: it must be a number in [0, 1)")


def check_limit(group: Mapping[str, Any]) -> None:
    """Check that ``limit`` is a number over 1.

    Raises:
        ValueError: naming the setting and its value.
    """
    limit = as_number(group["limit"])
    if limit is None or not limit > 1:
        raise ValueError(f"limit is {group['limit']!r}: it must be a number over 1 (inf: no limit)")


def check_rounding(group: Mapping[str, Any]) -> None:
    """Check that ``stochastic_rounding`` is None or a bool.

    Raises:
        ValueError: naming the setting and its value.
    """
    value = group["stochastic_rounding"]
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"stochastic_rounding is {value!r}: it must be None, True or False")


def check_flags(group: Mapping[str, Any], *names: str) -> None:
    """Check that settings are bools where they are given.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name in names:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"{name} is {group[name]!r}: it must be True or False")


def check_bits(group: Mapping[str, Any]) -> None:
    """Check that ``state_bits`` is 8 or 32 where it is given.

    Raises:
        ValueError: naming the setting and its value.
    """
    bits = group.get("state_bits", 32)
    if not isinstance(bits, int) or bits not in (8, 32):
        raise ValueError(f"state_bits is {bits!r}: it must be 8 or 32")


# Options of torch's AdamW that ours has not: values that change nothing, and why there are no others.
_OF_TORCH: dict[str, tuple[tuple[Any, ...], str]] = {
    "fused": ((None, True), "its step is fused wherever it runs"),
    "foreach": ((None,), "its step is fused wherever it runs"),
    "amsgrad": ((False,), "a maximum of second moments cannot be transported to another basis"),
    "maximize": ((False,), "negate the loss"),
    "capturable": ((False,), "a step cannot be captured in a CUDA graph, as bases and their versions change with it"),
    "differentiable": ((False,), "a step is not differentiable"),
}


def refuse_torch_options(optimizer: str, given: Mapping[str, Any]) -> None:
    """Refuse options of `torch.optim.AdamW` that an optimizer of ours does not have.

    Args:
        optimizer: its name, for messages.
        given: options by name.

    Raises:
        TypeError: torch has no such option either.
        ValueError: an option asks for what there is not; the message says what is allowed, and why.
    """
    for name, value in given.items():
        if name not in _OF_TORCH:
            raise TypeError(f"{optimizer} got an unexpected keyword argument {name!r}")
        allowed, why = _OF_TORCH[name]
        if not any(value is one for one in allowed):
            raise ValueError(
                f"{name} is {value!r}: {optimizer} takes {' or '.join(map(repr, allowed))} alone ({why}); leave it out"
            )


def rounds_stochastically(group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Return whether weights of a dtype are rounded at random: bfloat16 is, unless the group turns it off."""
    return dtype == torch.bfloat16 and group["stochastic_rounding"] is not False


def parameter_name(group: Mapping[str, Any], index: int, number: int) -> str:
    """Return what messages call a parameter: its name, if the optimizer was given one, or its place in the groups."""
    return str(group["param_names"][number]) if "param_names" in group else f"{number} of group {index}"


# Under this name groups had their count of steps until 0.2.
_SILENT = {"rounding_seed": "step_count"}


def rename_settings(group: MutableMapping[str, Any], renamed: Mapping[str, str], where: str) -> None:
    """Give settings of a group that stand under an old name their present one, with a DeprecationWarning.

    A value that a group has under its present name counts less than one under the old: somebody has just set that.

    Args:
        group: changed in place.
        renamed: {old: new}.
        where: what the settings are in, for the message.
    """
    for old, new in _SILENT.items():
        if old in group:
            group[new] = group.pop(old)
    for old, new in renamed.items():
        if old in group:
            group[new] = group.pop(old)
            warnings.warn(
                f"{where} has the setting {old!r}, which is called {new!r} since 0.3: the old name goes with the next "
                "release",
                DeprecationWarning,
                stacklevel=4,
            )


def is_on_device(value: object) -> bool:
    """Return whether a value is a number on a device that the host would have to wait for."""
    if not isinstance(value, torch.Tensor) or host_reads.reads_are_free(value.device):
        return False
    return value.numel() == 1 and value.is_floating_point()


def learning_rate(group: Mapping[str, Any]) -> float | torch.Tensor:
    """Return ``lr`` as a float; as a tensor without dimensions where the host would wait for it.

    That is the case for a tensor on the device of all parameters of the group, as schedules within CUDA graphs have it.
    """
    value = group["lr"]
    if is_on_device(value) and all(weight.device == value.device for weight in group["params"]):
        return value.detach().reshape(())  # type: ignore[no-any-return]
    return float(value)


def _is_decay(value: object, *, tensors: bool = False) -> bool:
    number = as_number(value, tensors=tensors)
    return number is not None and 0 <= number < 1


def as_number(value: object, *, tensors: bool = False) -> float | None:
    """Return a real number as a float; None for anything else, even a text that Python can read as a number.

    Args:
        tensors: whether a tensor of one element is a number.
    """
    if isinstance(value, torch.Tensor):
        return float(value.detach()) if tensors and value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
