"""The plan: each method's memory and time at a batch, and the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
_MOST_SAMPLES = 4096
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


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
        tell: is called with a few words ahead of what takes long.
    """

    config: Any
    batch: int
    seq: int
    dtype: torch.dtype
    settings: Settings
    lora_rank: int = 32
    galore_rank: int = 128
    chunked: bool = False
    tell: Callable[[str], object] = lambda what: None
    partitions: Partitions = field(init=False)
    _beside: dict[tuple[Any, Any, int], Planner] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        given = self.config, self.batch, self.seq, self.dtype, self.settings
        self.partitions = Partitions(*given, self.lora_rank, self.tell)

    def beside(self, rank: Any, tail: int | float | None, seq: int) -> Planner:
        """Return the planner of the same model at another rank, tail or length, made once: its graphs take long."""
        if (rank, tail, seq) == (self.settings.rank, self.settings.tail, self.seq):
            return self
        if (found := self._beside.get((rank, tail, seq))) is None:
            what = "" if tail is None else f" with a tail of {tail}"
            self.tell(f"trying rank {rank}{what}, {seq} tokens a sample")
            found = replace(self, settings=replace(self.settings, rank=rank, tail=tail), seq=seq)
            self._beside[rank, tail, seq] = found
        return found

    def stock(self, share: float = 1.0) -> tuple[States, Phases]:
        """Return what stock `torch.compile` and AdamW need, under torch's own activation budget."""
        return self.measure(Method(budget=share))

    def oasis(self, budget: float | str | None = None) -> tuple[States, Phases]:
        """Return what this backend needs under a memory budget: a share, or ``"12GiB"`` of the whole model."""
        return self.measure(self.ours(budget))

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
            **{_name(budget): self.ours(budget) for budget in budgets},
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
        fewer, traced = (self._work(method, model) for model in self.partitions.traces(method))
        graphs, blocks = self.partitions.graphs(method), blocks_of(self.config)
        return step_seconds(graphs, (fewer, traced), device, blocks, self.partitions.blocks)

    def measure(self, method: Method) -> tuple[States, Phases]:
        """Predict the memory of a step."""
        fewer, traced = self.partitions.traces(method)
        blocks, num_traced, rewritten = blocks_of(self.config), self.partitions.blocks, method.rewritten
        gradients = [memory.trained_bytes(model, rewritten) for model in (fewer, traced)]
        found = memory.phases(
            traced,
            self.partitions.graphs(method),
            rewritten=rewritten,
            block_gradients=gradients[1] - gradients[0],
            num_traced=num_traced,
            blocks=blocks,
            vocabulary=int(self.config.vocab_size),
            chunked=self.chunked,
        )
        if method.bits == 8:
            found = replace(found, step=memory.eight_bit_temporaries(traced))
        of_fewer, of_traced = self._states(method, fewer), self._states(method, traced)
        return memory.extrapolate(of_fewer, of_traced, blocks - num_traced), found

    def ours(self, budget: float | str | None, bits: int = 32) -> Method:
        """Return this backend and `OasisAdamW` as a method.

        Args:
            budget: as in `oasis`.
            bits: of the optimizer's states, 8 or 32.
        """
        settings = self.settings if budget is None else replace(self.settings, memory_budget=budget)
        return Method(Optimizer.OASIS, settings.budget, bits=bits)

    def _states(self, method: Method, traced: FakeModel) -> States:
        match method.optimizer:
            case Optimizer.EIGHT_BITS:
                return memory.adam8bit_states(traced.model)
            case Optimizer.GALORE:
                return memory.galore_states(traced.model, self._rewritten_names(), self.galore_rank)
            case Optimizer.OASIS:
                return memory.oasis_states(traced, method.bits)
        return memory.adam_states(traced.model)

    def _work(self, method: Method, traced: FakeModel) -> list[Kernel]:
        match method.optimizer:
            case Optimizer.EIGHT_BITS:
                return optimizer_work.adam8bit_work(memory.trained(traced.model))
            case Optimizer.GALORE:
                return optimizer_work.galore_work(traced.model, self._rewritten_names(), self.galore_rank)
            case Optimizer.OASIS:
                return optimizer_work.oasis_work(traced, method.bits)
        return optimizer_work.adamw_work(memory.trained(traced.model))

    def _rewritten_names(self) -> set[str]:
        """Names of the weights that we would rewrite, in the blocks that are traced."""
        traced = self.partitions.trace(self.partitions.blocks, Method())
        names = {traced.record.names[site.inputs.weight] for site in traced.trace.sites}
        return names | {name.replace(".1.", ".0.") for name in names}


def unit_of(rows: Sequence[Row]) -> tuple[int, str]:
    """Return the unit in which the sums of a plan are numbers to read: its bytes, and its name."""
    most = max(row.memory.total for row in rows)
    return next((unit for unit in UNITS if most >= unit[0]), UNITS[-1])


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
