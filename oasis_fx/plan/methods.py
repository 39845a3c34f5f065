"""The plan: each method's memory and time at a batch, the largest batch, and the largest budget of ours that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from oasis_fx.plan import memory, optimizer_work
from oasis_fx.plan.configs import blocks_of
from oasis_fx.plan.devices import Device
from oasis_fx.plan.kernels import Kernel
from oasis_fx.plan.memory import Memory, Phases, States
from oasis_fx.plan.partitions import Method, Optimizer, Partitions
from oasis_fx.plan.roofline import StepTime, step_seconds
from oasis_fx.plan.trace import FakeModel
from oasis_fx.settings import Settings

STOCK = "stock compile, AdamW"  # which ratios are to
STOCK_BUDGETS = (0.5, 0.3, 0.1)
BUDGETS = (1.0, 0.5, 0.3, 0.1)
_SEARCHED = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
_MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Row:
    """One method at the batch that was asked for.

    Attributes:
        memory: at its peak.
        largest_batch: that fits the limit; None where no limit was given.
        time: predicted; None where no device was given.
    """

    name: str
    memory: Memory
    largest_batch: int | None
    time: StepTime | None = None


@dataclass
class Planner:
    """Memory and time of one model at one batch and sequence, method by method.

    Args:
        config: of transformers, for a causal language model.
        dtype: of weights and activations.
        lora_rank, galore_rank: of those two.
        chunked: count logits as a cross-entropy in chunks has them.
    """

    config: Any
    batch: int
    seq: int
    dtype: torch.dtype
    settings: Settings
    lora_rank: int = 32
    galore_rank: int = 128
    chunked: bool = False
    partitions: Partitions = field(init=False)

    def __post_init__(self) -> None:
        given = self.config, self.batch, self.seq, self.dtype, self.settings
        self.partitions = Partitions(*given, self.lora_rank)

    def stock(self, share: float = 1.0) -> tuple[States, Phases]:
        """Return what stock `torch.compile` and AdamW need, under torch's own activation budget."""
        return self.measure(Method(budget=share))

    def oasis(self, budget: float | str | None = None) -> tuple[States, Phases]:
        """Return what this backend needs under a memory budget: a share, or ``"12GiB"`` of the whole model."""
        return self.measure(self._ours(budget))

    def methods(self) -> dict[str, Method]:
        """Return what is planned for, by name."""
        budgets: Sequence[float | str] = BUDGETS
        if self.settings.memory_budget not in budgets:
            budgets = (*budgets, self.settings.memory_budget)
        return {
            STOCK: Method(),
            **{f"stock, budget {share}": Method(budget=share) for share in STOCK_BUDGETS},
            "checkpointing": Method(checkpointed=True),
            "8-bit AdamW": Method(Optimizer.EIGHT_BITS),
            f"GaLore r={self.galore_rank}": Method(Optimizer.GALORE),
            f"LoRA r={self.lora_rank}": Method(adapters=True),
            **{_name(budget): self._ours(budget) for budget in budgets},
        }

    def rows(self, limit: int | None = None, device: Device | None = None) -> list[Row]:
        """Return a row for each method.

        Args:
            limit: in bytes, for the largest batch of each.
            device: for the time of a step.
        """
        found = []
        for name, method in self.methods().items():
            states, phases = self.measure(method)
            largest = None if limit is None else largest_batch(states, phases, self.batch, limit)
            time = None if device is None else self.time(method, device)
            found.append(Row(name, memory.peak(states, phases), largest, time))
        return found

    def time(self, method: Method, device: Device) -> StepTime:
        """Predict the time of a step on a device."""
        two, three = (self._work(method, blocks) for blocks in (2, 3))
        return step_seconds(self.partitions.graphs(method), (two, three), device, blocks_of(self.config))

    def measure(self, method: Method) -> tuple[States, Phases]:
        """Predict the memory of a step."""
        two, three = (self.partitions.trace(blocks, method) for blocks in (2, 3))
        blocks, rewritten = blocks_of(self.config), method.rewritten
        gradients = [memory.trained_bytes(traced, rewritten) for traced in (two, three)]
        found = memory.phases(
            three,
            self.partitions.graphs(method),
            gradients[1] - gradients[0],
            blocks,
            int(self.config.vocab_size),
            self.chunked,
        )
        fixed = [self._states(method, traced) for traced in (two, three)]
        return memory.extrapolate(*fixed, blocks=blocks), found

    def largest_budget(self, limit: int) -> tuple[float, Memory] | None:
        """Find the largest share of those tried under which the batch fits in ``limit`` bytes; None where none does."""
        for share in _SEARCHED:
            found = memory.peak(*self.oasis(share))
            if found.total <= limit:
                return share, found
        return None

    def _ours(self, budget: float | str | None) -> Method:
        settings = self.settings if budget is None else replace(self.settings, memory_budget=budget)
        return Method(Optimizer.OASIS, settings.budget)

    def _states(self, method: Method, traced: FakeModel) -> States:
        match method.optimizer:
            case Optimizer.EIGHT_BITS:
                return memory.adam8bit_states(traced.model)
            case Optimizer.GALORE:
                return memory.galore_states(traced.model, self._rewritten_names(), self.galore_rank)
            case Optimizer.OASIS:
                return memory.oasis_states(traced)
        return memory.adam_states(traced.model)

    def _work(self, method: Method, blocks: int) -> list[Kernel]:
        traced = self.partitions.trace(blocks, method)
        match method.optimizer:
            case Optimizer.EIGHT_BITS:
                return optimizer_work.adam8bit_work(memory.trained(traced.model))
            case Optimizer.GALORE:
                return optimizer_work.galore_work(traced.model, self._rewritten_names(), self.galore_rank)
            case Optimizer.OASIS:
                return optimizer_work.oasis_work(traced)
        return optimizer_work.adamw_work(memory.trained(traced.model))

    def _rewritten_names(self) -> set[str]:
        """Names of the weights that we would rewrite, in three blocks."""
        traced = self.partitions.trace(3, Method())
        names = {traced.record.names[site.inputs.weight] for site in traced.trace.sites}
        return names | {name.replace(".1.", ".0.") for name in names}


def largest_batch(states: States, phases: Phases, batch: int, limit: int) -> int:
    """Find how many samples fit in ``limit`` bytes: what is neither state nor gradient grows with the batch."""
    low, high = 0, 1
    while high <= _MOST_SAMPLES and memory.peak(states, scaled(phases, high / batch)).total <= limit:
        low, high = high, 2 * high
    while low < high - 1:
        middle = (low + high) // 2
        if memory.peak(states, scaled(phases, middle / batch)).total <= limit:
            low = middle
        else:
            high = middle
    return low


def scaled(phases: Phases, factor: float) -> Phases:
    """Return the phases at another batch, ``factor`` times as large."""

    def grow(kinds: Mapping[str, int]) -> dict[str, int]:
        return {kind: size if kind == "gradients" else int(size * factor) for kind, size in kinds.items()}

    return replace(phases, forward=grow(phases.forward), backward=grow(phases.backward))


def _name(budget: float | str) -> str:
    return "oasis" if budget == 1.0 else f"oasis, budget {budget}"
