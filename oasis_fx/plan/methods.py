"""The plan: each method's memory at a batch, the largest batch that fits, and the largest budget of ours that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from oasis_fx.plan import memory
from oasis_fx.plan.configs import blocks_of, with_blocks
from oasis_fx.plan.memory import Memory, Phases, States
from oasis_fx.plan.trace import FakeModel, Halves, halves_under, trace_fake
from oasis_fx.settings import Settings

STOCK_BUDGETS = (0.5, 0.3, 0.1)
BUDGETS = (1.0, 0.5, 0.3, 0.1)
_SEARCHED = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)
# Of three blocks, tried for a budget of the whole model; the largest first.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.05, 0.03)
_MOST_SAMPLES = 4096


@dataclass(frozen=True)
class Row:
    """One method at the batch that was asked for.

    Attributes:
        memory: at its peak.
        largest_batch: that fits the limit; None where no limit was given.
    """

    name: str
    memory: Memory
    largest_batch: int | None


@dataclass
class Planner:
    """Memory of one model at one batch and sequence, method by method.

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
    _traced: dict[tuple[int, int], FakeModel] = field(default_factory=dict)
    _partitions: dict[tuple[bool, float, int], Halves] = field(default_factory=dict)

    def stock(self, share: float = 1.0) -> tuple[States, Phases]:
        """Return what stock `torch.compile` and AdamW need, under torch's own activation budget."""
        return self._measure(False, share, memory.adam_states)

    def adam8bit(self) -> tuple[States, Phases]:
        """Return what stock `torch.compile` needs with torchao's 8-bit AdamW."""
        return self._measure(False, 1.0, memory.adam8bit_states)

    def galore(self) -> tuple[States, Phases]:
        """Return what stock `torch.compile` needs with GaLore on the weights that we would rewrite."""
        traced = self._trace(3)
        rewritten = {traced.record.names[site.inputs.weight] for site in traced.trace.sites}
        rewritten |= {name.replace(".1.", ".0.") for name in rewritten}

        def states(model: torch.nn.Module) -> States:
            return memory.galore_states(model, rewritten, self.galore_rank)

        return self._measure(False, 1.0, states)

    def lora(self) -> tuple[States, Phases]:
        """Return what adapters as peft's need, on all linear layers of the blocks, compiled, with AdamW."""
        return self._measure(False, 1.0, memory.adam_states, self.lora_rank)

    def oasis(self, budget: float | str | None = None) -> tuple[States, Phases]:
        """Return what this backend needs under a memory budget: a share, or ``"12GiB"`` of the whole model."""
        limit = self.settings.budget if budget is None else replace(self.settings, memory_budget=budget).budget
        return self._measure(True, limit, None)

    def rows(self, limit: int | None = None) -> list[Row]:
        """Return a row for each method; with a limit in bytes, the largest batch of each."""
        methods: dict[str, Callable[[], tuple[States, Phases]]] = {
            "stock compile, AdamW": self.stock,
            **{f"stock, budget {share}": partial(self.stock, share) for share in STOCK_BUDGETS},
            "8-bit AdamW": self.adam8bit,
            f"GaLore r={self.galore_rank}": self.galore,
        }
        methods[f"LoRA r={self.lora_rank}"] = self.lora
        budgets: Sequence[float | str] = BUDGETS
        if self.settings.memory_budget not in budgets:
            budgets = (*budgets, self.settings.memory_budget)
        for budget in budgets:
            methods[_name(budget)] = partial(self.oasis, budget)
        found = []
        for name, method in methods.items():
            states, phases = method()
            largest = None if limit is None else largest_batch(states, phases, self.batch, limit)
            found.append(Row(name, memory.peak(states, phases), largest))
        return found

    def largest_budget(self, limit: int) -> tuple[float, Memory] | None:
        """Find the largest share of those tried under which the batch fits in ``limit`` bytes; None where none does."""
        for share in _SEARCHED:
            found = memory.peak(*self.oasis(share))
            if found.total <= limit:
                return share, found
        return None

    def _trace(self, blocks: int, lora_rank: int = 0) -> FakeModel:
        key = (blocks, lora_rank)
        if key not in self._traced:
            config = with_blocks(self.config, blocks)
            plain = replace(self.settings, memory_budget=1.0)
            if lora_rank:  # the adapters, so that there is a trace; what is looked at is the graph before
                plain = Settings(rank=1)
            self._traced[key] = trace_fake(config, self.batch, self.seq, self.dtype, plain, lora_rank)
        return self._traced[key]

    def _partition(self, rewritten: bool, share: float, lora_rank: int) -> Halves:
        key = (rewritten, share, lora_rank)
        if key not in self._partitions:
            budget = None if share == 1.0 else share
            self._partitions[key] = halves_under(self._trace(3, lora_rank), budget, rewritten=rewritten)
        return self._partitions[key]

    def _saved(self, rewritten: bool, share: float, lora_rank: int = 0) -> int:
        """Bytes that the whole model keeps where three blocks of it are under a share."""
        forward, _ = self._partition(rewritten, share, lora_rank)
        number = self._trace(3, lora_rank).trace.num_forward_outputs
        everything, block = memory.saved_bytes(forward, number)
        return everything + (blocks_of(self.config) - 3) * block

    def _share_of_three(self, rewritten: bool, allowed: float, lora_rank: int) -> float:
        """The share for three blocks under which the whole model keeps ``allowed`` bytes at most.

        It is another one than the whole model's: head and loss are most of what three blocks save.
        """
        low, high = 0, len(_SHARES) - 1
        if self._saved(rewritten, 1.0, lora_rank) <= allowed:
            return 1.0
        while low < high:  # the first, that is the largest, that fits
            middle = (low + high) // 2
            if self._saved(rewritten, _SHARES[middle], lora_rank) <= allowed:
                high = middle
            else:
                low = middle + 1
        return _SHARES[low]

    def _measure(
        self,
        rewritten: bool,
        budget: int | float | None,
        states: Callable[[torch.nn.Module], States] | None,
        lora_rank: int = 0,
    ) -> tuple[States, Phases]:
        two, three = (self._trace(blocks, lora_rank) for blocks in (2, 3))
        blocks, share = blocks_of(self.config), 1.0
        if budget is not None and budget != 1.0:
            allowed = budget if isinstance(budget, int) else budget * self._saved(rewritten, 1.0, lora_rank)
            share = self._share_of_three(rewritten, allowed, lora_rank)
        graphs = self._partition(rewritten, share, lora_rank)
        gradients = [memory.trained_bytes(traced, rewritten) for traced in (two, three)]
        found = memory.phases(
            three, graphs, gradients[1] - gradients[0], blocks, int(self.config.vocab_size), self.chunked
        )
        if states is None:
            fixed = [memory.oasis_states(traced) for traced in (two, three)]
        else:
            fixed = [states(traced.model) for traced in (two, three)]
        return memory.extrapolate(*fixed, blocks=blocks), found


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
