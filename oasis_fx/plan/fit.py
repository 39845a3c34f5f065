"""Search for settings of ours under which a training step fits: rank, tail, state bits, budget, batch, sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from oasis_fx.memory.node_costs import readable_bytes
from oasis_fx.plan import memory
from oasis_fx.plan.devices import Device
from oasis_fx.plan.memory import Memory, Phases, States
from oasis_fx.plan.methods import Planner, scaled
from oasis_fx.plan.roofline import StepTime

SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05)  # of what would be kept; the largest first
_LEAST_SEQ = 128  # tokens of a sample: what is shorter is another task


@dataclass(frozen=True)
class Choice:
    """Settings of this backend, and what a step needs with them.

    Attributes:
        rank, tail: as `oasis_fx.oasis_backend` takes them.
        bits: of the optimizer's states.
        budget: ``memory_budget``, a share.
        parts: how many backward passes a step has, each of an equal part of the batch.
        batch, seq: of one backward pass.
        memory: at the peak.
        time: of a step, with all its parts.
        ratio: of its seconds a token to those of stock at what was asked for.
    """

    rank: Any
    tail: int | float | None
    bits: int
    budget: float
    parts: int
    batch: int
    seq: int
    memory: Memory
    time: StepTime
    ratio: float

    def lines(self) -> list[str]:
        """Return the lines of Python that stand for these settings."""
        backend = f"rank={self.rank!r}"
        backend += "" if self.tail is None else f", tail={self.tail!r}"
        backend += "" if self.budget == 1.0 else f", memory_budget={self.budget}"
        optimizer = "" if self.bits == 32 else ", state_bits=8"
        return [
            f"model = torch.compile(model, backend=oasis_backend({backend}))",
            f"optimizer = OasisAdamW(model.parameters(){optimizer})",
        ]

    def gives_up(self, asked: Planner) -> list[str]:
        """Return what these settings give up beside those that were asked for, in words."""
        settings, found = asked.settings, []
        if self.rank != settings.rank:
            found.append(f"bases of rank {self.rank} instead of {settings.rank}")
        if self.tail != settings.tail and self.tail is None:
            found.append("the tail")
        if self.bits == 8:
            found.append("moments in float32: they are rounded to eight bits")
        if self.seq != asked.seq:
            found.append(f"sequences of {asked.seq} tokens: they have {self.seq}")
        if self.parts > 1:
            found.append(
                f"one backward pass a step: {self.parts}, of {self.batch} samples each, add up their gradients"
            )
        if self.budget != 1.0:
            found.append(f"time: what is kept for the backward pass is {self.budget:.0%}, the rest is recomputed")
        return found

    def record(self, asked: Planner) -> dict[str, Any]:
        """Return all of it for a file."""
        return {
            "rank": self.rank, "tail": self.tail, "state_bits": self.bits, "memory_budget": self.budget,
            "batch": self.batch, "backward_passes": self.parts, "seq": self.seq,
            "bytes": dict(self.memory.bytes_of), "phase": self.memory.phase,
            "predicted_seconds": {"step": self.time.step, **asdict(self.time)}, "predicted_ratio": self.ratio,
            "lines": self.lines(), "gives_up": self.gives_up(asked),
        }  # fmt: skip


def search(asked: Planner, limit: int, device: Device, stock: StepTime) -> tuple[list[Choice], Choice]:
    """Find the settings that fit in ``limit`` bytes, the quickest first; and those of all tried that need least.

    Tried are lower ranks, a tail beside the lowest, eight-bit states, each of `SHARES` as a budget, and the batch in
    equal parts; and, where nothing fits, sequences of half the length, as often as that takes. What is slower than
    another setting that gives up no more is left out.

    Args:
        asked: the model and the settings to begin with.
        device: whose times they are ordered by.
        stock: the time of stock `torch.compile` at what was asked for.
    """
    least: Choice | None = None
    seconds = stock.step / (asked.batch * asked.seq)
    seq, found = asked.seq, list[Choice]()
    while True:
        for planner in _planners(asked, seq):
            for bits in (32, 8):
                for choice in _choices(planner, bits, limit, device, seconds):
                    if choice.memory.total <= limit:
                        found.append(choice)
                    if least is None or choice.memory.total < least.memory.total:
                        least = choice
        if found or seq < 2 * _LEAST_SEQ:
            assert least is not None  # at least one setting was tried
            return _undominated(sorted(found, key=lambda choice: choice.ratio)), least
        seq //= 2


def _planners(asked: Planner, seq: int) -> Iterator[Planner]:
    """The model with each rank and tail to try."""
    settings = asked.settings
    tried = [(settings.rank, settings.tail)]
    if isinstance(settings.rank, int | float):
        half, quarter = (_divided(settings.rank, by) for by in (2, 4))
        tried += [(half, settings.tail), (quarter, settings.tail)]
        tried.append((quarter, quarter if settings.tail is None and settings.rule.name == "oja" else None))
    elif settings.tail is not None:
        tried.append((settings.rank, None))
    for rank, tail in dict.fromkeys(tried):
        yield asked.beside(rank, tail, seq)


def _divided(rank: int | float, by: int) -> int | float:
    return rank / by if isinstance(rank, float) else max(1, rank // by)


def _choices(planner: Planner, bits: int, limit: int, device: Device, seconds: float) -> Iterator[Choice]:
    """The largest budget that fits for each number of parts, until it fits without one; else the smallest budget."""
    known: dict[float, tuple[States, Phases]] = {}
    for parts in (number for number in range(1, planner.batch + 1) if planner.batch % number == 0):
        for share in SHARES:
            method = planner.ours(share, bits)
            if share not in known:
                known[share] = planner.measure(method)
            needed = _in_parts(*known[share], parts)
            if needed.total <= limit or share == SHARES[-1]:
                break
        time = planner.time(method, device)
        time = replace(time, host=parts * time.host)
        ratio = time.step / (planner.batch * planner.seq) / seconds
        settings = planner.settings
        yield Choice(
            settings.rank, settings.tail, bits, share, parts, planner.batch // parts, planner.seq, needed, time, ratio
        )
        if share == 1.0:
            return


def _in_parts(states: States, phases: Phases, parts: int) -> Memory:
    """The peak where a batch is taken in parts: the gradients of earlier parts are there while a later one runs."""
    if parts == 1:
        return memory.peak(states, phases)
    smaller = scaled(phases, 1 / parts)

    def holding(kinds: Mapping[str, int]) -> dict[str, int]:
        return {**kinds, "gradients": kinds.get("gradients", 0) + phases.gradients}

    forward, backward = holding(smaller.forward), holding(smaller.backward)
    return memory.peak(states, replace(smaller, largest={}, forward=forward, backward=backward))


def _undominated(ordered: Sequence[Choice]) -> list[Choice]:
    """Leave out what another one is not slower than and gives up no more than; they are ordered by time."""
    kept: list[Choice] = []
    for choice in ordered:
        if not any(_gives_up_no_more(other, choice) for other in kept):
            kept.append(choice)
    return kept


def _gives_up_no_more(one: Choice, other: Choice) -> bool:
    if type(one.rank) is not type(other.rank) or not isinstance(one.rank, int | float):
        same_rank = one.rank == other.rank
    else:
        same_rank = one.rank >= other.rank
    tails = (one.tail or 0) >= (other.tail or 0) or one.rank != other.rank
    return same_rank and tails and one.bits >= other.bits and one.parts <= other.parts and one.seq >= other.seq


def as_text(found: Sequence[Choice], least: Choice, asked: Planner, size: str, device: Device, most: int = 8) -> str:
    """Return what was found as text: at most ``most`` settings, each with its lines of Python and what it gives up."""
    what = f"oasis_fx at {asked.batch} x {asked.seq} tokens in {size}"
    if not found:
        settings = f"rank {least.rank}, state_bits={least.bits}, memory_budget={least.budget}"
        kinds = sorted(least.memory.bytes_of.items(), key=lambda item: -item[1])[:3]
        made_of = ", ".join(f"{readable_bytes(count)} of {kind}" for kind, count in kinds)
        return (
            f"{what}: does not fit. The least of all that were tried is {readable_bytes(least.memory.total)} "
            f"({settings}, {least.batch} x {least.seq} tokens in a backward pass): {made_of}"
        )
    head = f"{what}: these settings fit, the quickest first (time of a token, predicted for {device.name}, to stock's)"
    parts = [head]
    for number, choice in enumerate(found[:most], 1):
        given = choice.gives_up(asked)
        parts.append(
            "\n".join(
                [
                    f"{number}. {choice.ratio:.2f} of the time, {readable_bytes(choice.memory.total)}",
                    *(f"     {line}" for line in choice.lines()),
                    *([f"   gives up {line}" for line in given] or ["   gives up nothing"]),
                ]
            )
        )
    if len(found) > most:
        parts.append(f"{len(found) - most} slower ones are left out; --json has them")
    return "\n\n".join(parts)
