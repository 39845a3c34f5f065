"""What the functions of one optimizer step are told besides weights and gradients.

Whether a step is taken at all is known on the device only, where a GPU is concerned: the host does not wait for the
verdict on the gradients. So a step that is left out is computed as any other, and nothing of it is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from oasis_fx.runtime.optim.updates import State

S_co = TypeVar("S_co", covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Step(Generic[S_co]):
    """One step of weights that are on one device, of one dtype, and have equal settings.

    Attributes:
        settings: of the optimizer, for these weights at this step.
        gate: bool scalar on the device of the weights; where it is false, weights and states must stay as they are.
            None for true.
        generator: for stochastic rounding, on the device of the weights.
    """

    settings: S_co
    gate: torch.Tensor | None
    generator: torch.Generator

    def where(self, value: torch.Tensor, otherwise: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``value``; where the gate is false, ``otherwise``, which is zeros by default."""
        if self.gate is None:
            return value
        return torch.where(self.gate, value, torch.zeros_like(value) if otherwise is None else otherwise)

    def count(self, states: Sequence[State]) -> None:
        """Add 1 to the step count of each state, or 0 where the gate is false."""
        counts = [state["step"] for state in states]
        if self.gate is None:
            torch._foreach_add_(counts, 1)
        elif counts:
            # With `alpha`, or torch would take the gate for a number, and read it.
            torch._foreach_add_(counts, self.gate.to(counts[0].dtype), alpha=1)


class Generators(dict[torch.device, torch.Generator]):
    """Random generators of one step, by device, each made and seeded when it is asked for.

    Args:
        seed: of all of them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed

    def __missing__(self, device: torch.device) -> torch.Generator:
        self[device] = torch.Generator(device).manual_seed(self.seed)
        return self[device]


@dataclass(frozen=True)
class StepContext:
    """One optimizer step on all devices.

    Attributes:
        gate: bool scalar on any device: whether every gradient is finite. None where the host knows that it is.
        generators: for stochastic rounding, one for each device.
    """

    gate: torch.Tensor | None
    generators: Mapping[torch.device, torch.Generator]

    def gate_on(self, device: torch.device) -> torch.Tensor | None:
        """Return the gate on a device."""
        return None if self.gate is None else self.gate.to(device)

    def on(self, device: torch.device, settings: T) -> Step[T]:
        """Return the step of the weights of one device that have these settings."""
        return Step(settings, self.gate_on(device), self.generators[device])
