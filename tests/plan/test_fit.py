"""Which settings of those that fit are shown, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from oasis_fx.plan.fit import Choice, _in_parts, _undominated, as_text, search
from oasis_fx.plan.memory import KINDS, Memory, Phases, States
from oasis_fx.plan.roofline import StepTime
from oasis_fx.settings import Settings

BASE = Choice(
    rank=128,
    tail=None,
    bits=32,
    budget=1.0,
    parts=1,
    batch=4,
    seq=512,
    memory=Memory(dict.fromkeys(KINDS, 100), "backward"),
    time=StepTime(1.0, 1.0, 1.0, 0.0),
    ratio=1.0,
)
ASKED = SimpleNamespace(settings=Settings(rank=128), batch=4, seq=512)


def test_what_is_slower_and_gives_up_no_less_is_left_out() -> None:
    quick_and_coarse = replace(BASE, rank=32, ratio=0.8)
    slow_and_fine = replace(BASE, ratio=0.9)
    slower = replace(BASE, rank=64, ratio=1.0)  # of a smaller rank than one that is quicker
    slower_in_eight_bits = replace(BASE, bits=8, ratio=1.1)
    ordered = [quick_and_coarse, slow_and_fine, slower, slower_in_eight_bits]
    assert _undominated(ordered) == [quick_and_coarse, slow_and_fine]


@pytest.mark.parametrize(
    ("change", "line", "given_up"),
    [
        ({}, "rank=128)", []),
        ({"rank": 32}, "rank=32)", ["bases of rank 32 instead of 128"]),
        ({"budget": 0.3}, "rank=128, memory_budget=0.3)", ["time: what is kept for the backward pass is 30%"]),
        ({"bits": 8}, "state_bits=8)", ["moments in float32"]),
        ({"parts": 2, "batch": 2}, "rank=128)", ["one backward pass a step: 2, of 2 samples each"]),
        ({"seq": 256}, "rank=128)", ["sequences of 512 tokens: they have 256"]),
    ],
)
def test_lines_and_what_they_give_up(change, line, given_up) -> None:
    choice = replace(BASE, **change)
    assert any(line in text for text in choice.lines())
    found = choice.gives_up(ASKED)
    assert len(found) == len(given_up) and all(one.startswith(text) for one, text in zip(found, given_up, strict=True))
    text = as_text([choice], choice, ASKED, "24GiB", SimpleNamespace(name="H100"))
    assert line in text and ("gives up nothing" in text) == (not given_up)


def test_the_parts_of_a_batch_hold_what_earlier_ones_have_left() -> None:
    states = States(weights=1000, optimizer=100)
    phases = Phases({"activations": 600}, {"activations": 600, "gradients": 50}, 80)
    whole, parts = _in_parts(states, phases, 1), _in_parts(states, phases, 2)
    assert whole.total == 1000 + 100 + 600 + 50
    assert parts.total == 1000 + 100 + 300 + 50 + 80


def test_the_largest_budget_that_fits_is_taken() -> None:
    """With activations of 1000 at a share of 1 and weights of 500; rank does not matter here."""

    class Planner:
        settings, batch, seq = Settings(rank=8), 1, 128
        dtype = None

        def ours(self, share, bits):
            return share, bits

        def measure(self, method):
            share, bits = method
            states = States(weights=500, optimizer=200 if bits == 32 else 50)
            return states, Phases({"activations": 0}, {"activations": int(1000 * share)}, 0)

        def time(self, method, device):
            return StepTime(1.0, 2.0 - method[0], 0.1 if method[1] == 32 else 0.15, 0.0)

        def tell(self, what):
            pass

    planner = Planner()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oasis_fx.plan.fit._planners", lambda asked, seq: [planner])
        found, least = search(planner, 1200, None, StepTime(1.0, 1.0, 0.0, 0.0))
        assert [(choice.bits, choice.budget) for choice in found] == [(8, 0.6), (32, 0.5)]
        nothing, least = search(planner, 400, None, StepTime(1.0, 1.0, 0.0, 0.0))
        assert nothing == [] and (least.bits, least.budget) == (8, 0.05)
