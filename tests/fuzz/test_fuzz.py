"""Three hundred random programs are right; `make fuzz` runs ten thousand."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz.calling import alone
from fuzz.not_yet import left_out
from fuzz.oracle import draw, judge
from fuzz.runner import fails_like
from fuzz.shrink import shrink

COUNT, AT_ONCE = 300, 25


@pytest.fixture(autouse=True, scope="module")
def few_collections() -> Iterator[None]:
    """What torch has imported is not looked through after each program: a tenth of the time."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=[pytest.mark.slow] if first >= 50 else []) for first in range(0, COUNT, AT_ONCE)],
)
def test_random_programs(first: int) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(first, first + AT_ONCE):
        program = draw(seed)
        if left_out(program):
            continue
        verdict = judge(program)
        kinds[verdict.kind] += 1
        if verdict.failed:
            small = shrink(program, fails_like(verdict))
            verdict = judge(small)
            pytest.fail(f"seed {seed}: {verdict.what}: {verdict.detail}\n{alone(small)}")
    assert kinds["right"] >= 0.8 * kinds.total(), kinds  # else stock torch runs too little of what is drawn
