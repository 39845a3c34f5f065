"""How a budget of columns is shared out: against every possible sharing, and at its edges."""

from __future__ import annotations

import itertools

import pytest

from oasis_fx.runtime.subspaces import rank_allocation as rank_budget
from oasis_fx.runtime.subspaces.rank_allocation import QUANTUM, Spectrum, geometric, joined, share_out


def falling(ratio: float, n: int, rank: int, rows: int = 64, share: float = 0.25) -> Spectrum:
    values = [ratio**k for k in range(n)]
    return Spectrum([v / sum(values) for v in values[:rank]], n, rows, rank, share)


def cost(spectra, ranks) -> int:
    return sum(s.cost * rank for s, rank in zip(spectra, ranks, strict=True))


@pytest.mark.parametrize("total", [0.0, 0.05, 0.5, 2.9])
def test_the_unknown_tail_falls_and_sums_to_what_is_left(total) -> None:
    tail = geometric(0.3, total, 10)
    assert sum(tail) == pytest.approx(total, abs=1e-9)
    assert all(0.3 >= a >= b >= 0 for a, b in itertools.pairwise(tail))


def test_a_tail_that_would_rise_is_flat() -> None:
    assert geometric(0.1, 2.0, 10) == [0.2] * 10
    assert geometric(0.1, 0.0, 0) == []


def test_an_exact_geometric_spectrum_is_found_again() -> None:
    whole = falling(0.9, 64, 16).whole()
    assert whole == pytest.approx(falling(0.9, 64, 64).captured, abs=1e-6)


def test_columns_go_where_the_spectrum_is_long() -> None:
    steep, flat = falling(0.5, 128, 32), falling(0.99, 128, 32)
    few, many = share_out([steep, flat])
    assert few == 16 and many == 48


def test_equal_spectra_stay_even() -> None:
    assert share_out([falling(0.9, 128, 32)] * 3) == [32, 32, 32]


def test_no_other_sharing_captures_more(monkeypatch) -> None:
    monkeypatch.setattr(rank_budget, "QUANTUM", 1)
    monkeypatch.setattr(rank_budget, "LEAST", 0.0)
    spectra = [falling(ratio, 12, 12, share=1 / 3) for ratio in (0.4, 0.7, 0.95)]

    def captured(ranks) -> float:
        return sum(sum(s.captured[:rank]) for s, rank in zip(spectra, ranks, strict=True))

    every = [r for r in itertools.product(range(1, 13), repeat=3) if cost(spectra, r) <= cost(spectra, (4, 4, 4))]
    assert captured(share_out(spectra)) == pytest.approx(max(map(captured, every)))


def test_equal_layers_share_a_rank_for_what_all_of_them_cost() -> None:
    flat, steep = [1 / 64] * 64, [2.0 ** -(k + 1) for k in range(64)]
    one = [Spectrum(flat[:16], 64, 64, 16, 0.25), Spectrum(steep[:16], 64, 64, 16, 0.25)]
    both = joined(one)
    assert both.cost == one[0].cost + one[1].cost and both.even == 16
    assert both.captured == pytest.approx([(a + b) / 2 for a, b in zip(flat[:16], steep[:16], strict=True)])
    third = Spectrum(flat[:16], 64, 64, 16, 0.25)
    shared, alone = share_out([both, third])
    assert both.cost * shared + third.cost * alone <= 16 * (both.cost + third.cost) and alone > shared


def test_budget_floor_and_ceiling() -> None:
    spectra = [falling(0.3, 64, 16, rows=192), falling(0.99, 172, 43, rows=64), falling(0.999, 16, 4, rows=16)]
    ranks = share_out(spectra)
    assert cost(spectra, ranks) <= cost(spectra, [s.even for s in spectra]) + QUANTUM * sum(s.cost for s in spectra)
    for s, rank in zip(spectra, ranks, strict=True):
        assert s.even // 2 <= rank <= s.n


def test_a_small_change_is_none() -> None:
    s = Spectrum([0.04] * 20, 64, 64, 20, 0.25)  # the even share is 16, 4 columns from its rank
    assert share_out([s]) == [20]


def test_columns_go_where_they_are_cheap_for_what_they_do() -> None:
    """Flat spectra: a column of the first serves 400 rows and costs 1328, of the second 500 rows and 2300."""
    cheap, dear = (Spectrum([1 / n] * 8, n, rows, 8, 0.5) for n, rows in ((64, 400), (400, 500)))
    first, second = share_out([cheap, dear])
    assert first > cheap.even and second < dear.even
