"""The graphs that each method runs, of the first blocks of a model, traced once and split once for each share.

Three blocks are traced, or all of a model that has fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from oasis_fx.plan import memory
from oasis_fx.plan.configs import blocks_of, with_blocks
from oasis_fx.plan.trace import FakeModel, Halves, halves_under, trace_fake
from oasis_fx.settings import Settings

_TRACED = 3  # blocks: the first, the last, and one that stands for all between
# Of the blocks that are traced, tried for a budget of the whole model; the largest first.
_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.05, 0.03)


class Optimizer(Enum):
    """Whose step is taken."""

    ADAMW = "torch's fused AdamW"
    EIGHT_BITS = "torchao's 8-bit AdamW"
    GALORE = "GaLore"
    OASIS = "OasisAdamW"


@dataclass(frozen=True)
class Method:
    """What a user would choose: which graphs run, and which optimizer steps.

    Attributes:
        optimizer: `Optimizer.OASIS` goes with graphs as this backend rewrites them, the others with stock ones.
        budget: a share of what would be kept for the backward pass, or bytes (int); None is no budget.
        adapters: those of LoRA are trained, and nothing else.
        checkpointed: each block is recomputed in the backward pass.
        bits: of the states of `OasisAdamW`, 8 or 32.
    """

    optimizer: Optimizer = Optimizer.ADAMW
    budget: int | float | None = None
    adapters: bool = False
    checkpointed: bool = False
    bits: int = 32

    @property
    def rewritten(self) -> bool:
        return self.optimizer is Optimizer.OASIS


@dataclass
class Partitions:
    """What is known of the graphs of one model, at one batch and sequence.

    Args:
        config: of transformers, for a causal language model.
        dtype: of weights and activations.
        lora_rank: of adapters.
        tell: is called with a few words ahead of what takes long.
    """

    config: Any
    batch: int
    seq: int
    dtype: torch.dtype
    settings: Settings
    lora_rank: int
    tell: Callable[[str], object] = lambda what: None
    _traced: dict[tuple[int, bool, bool], FakeModel] = field(default_factory=dict)
    _partitions: dict[tuple[Method, float], Halves] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """How many blocks are traced."""
        return min(_TRACED, blocks_of(self.config))

    def traces(self, method: Method) -> tuple[FakeModel, FakeModel]:
        """Return the model with one block fewer than are traced, and with these.

        The difference is what a block more takes; it is nothing where all blocks of the model are traced.
        """
        fewer = self.blocks if self.blocks == blocks_of(self.config) else self.blocks - 1
        return self.trace(fewer, method), self.trace(self.blocks, method)

    def trace(self, blocks: int, method: Method) -> FakeModel:
        """Return the model with a number of blocks as a method has it, and what our backend made of it."""
        key = (blocks, method.adapters, method.checkpointed)
        if key not in self._traced:
            how = ", with adapters" if method.adapters else ", with checkpointing" if method.checkpointed else ""
            self.tell(f"compiling {blocks} blocks{how}")
            config = with_blocks(self.config, blocks)
            plain = replace(self.settings, memory_budget=1.0)
            if method.adapters:  # so that there is a trace; what is looked at is the graph before
                plain = Settings(rank=1)
            lora_rank = self.lora_rank if method.adapters else 0
            self._traced[key] = trace_fake(
                config, self.batch, self.seq, self.dtype, plain, lora_rank, checkpointed=method.checkpointed
            )
        return self._traced[key]

    def partition(self, method: Method, share: float) -> Halves:
        """Return the graphs of the traced blocks of which a share is kept."""
        whose = Optimizer.OASIS if method.rewritten else Optimizer.ADAMW
        key = (replace(method, optimizer=whose, budget=None, bits=32), share)
        if key not in self._partitions:
            budget = None if share == 1.0 else share
            self.tell("choosing what is kept" if budget is None else f"choosing what is kept, a share of {share}")
            traced = self.trace(self.blocks, method)
            self._partitions[key] = halves_under(traced, budget, rewritten=method.rewritten)
        return self._partitions[key]

    def graphs(self, method: Method) -> Halves:
        """Return the graphs of the traced blocks as they are where the whole model is under the method's budget."""
        budget, share = method.budget, 1.0
        if budget is not None and budget != 1.0:
            allowed = budget if isinstance(budget, int) else budget * self.saved(method, 1.0)
            share = self._share_of_traced(method, allowed)
        return self.partition(method, share)

    def saved(self, method: Method, share: float) -> int:
        """Count the bytes that the whole model keeps where the traced blocks of it are under a share."""
        forward, _ = self.partition(method, share)
        number = self.trace(self.blocks, method).trace.num_forward_outputs
        everything, block = memory.saved_bytes(forward, number, self.blocks)
        return everything + (blocks_of(self.config) - self.blocks) * block

    def _share_of_traced(self, method: Method, allowed: float) -> float:
        """The share for the traced blocks under which the whole model keeps ``allowed`` bytes at most.

        It is another one than the whole model's: head and loss are most of what few blocks save.
        """
        low, high = 0, len(_SHARES) - 1
        if self.saved(method, 1.0) <= allowed:
            return 1.0
        while low < high:  # the first, that is the largest, that fits
            middle = (low + high) // 2
            if self.saved(method, _SHARES[middle]) <= allowed:
                high = middle
            else:
                low = middle + 1
        return _SHARES[low]
