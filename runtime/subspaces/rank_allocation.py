"""Share a budget of columns out over subspaces: ``rank=AutoRank(0.25)``.

A column of a subspace costs the numbers that it holds: n each for the basis and its statistic, and for each row of its
weights a gradient and two moments, so ``2 n + 3 sum of m``. The budget is what ``share * n`` columns in each subspace
would cost. A column is worth the part of ||A||^2 that it captures, times the number of parameters that learn by it,
``n * sum of m``. Columns go, eight at a time, to where they are worth most for their cost.

Beyond the present rank the spectrum is unknown but for its sum: it is taken to fall geometrically from the last known
value, at the ratio that makes the sum right.

Subspaces that one compiled graph serves in turn, as those of equal layers compiled block by block, get one rank.

No subspace gets less than half of its even share. The method is ours; docs/results.md says what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

QUANTUM = 8
LEAST = 0.5  # of the even share


@dataclass(frozen=True)
class Spectrum:
    """What the allocation knows of one subspace, or of several that have to have one rank.

    Attributes:
        captured: what each direction of the basis captures of ||A||^2, falling; they sum to 1 at most.
        n: length of its columns.
        rows: m, summed over its weights.
        rank: its present columns.
        share: of n, the even share.
        count: of the subspaces that it stands for.
    """

    captured: Sequence[float]
    n: int
    rows: int
    rank: int
    share: float
    count: int = 1

    @property
    def cost(self) -> int:
        """The numbers that one column more in each of the subspaces would hold."""
        return 2 * self.n * self.count + 3 * self.rows

    @property
    def even(self) -> int:
        """The columns of its even share, from 1."""
        return max(1, round(self.share * self.n))

    def whole(self) -> list[float]:
        """Return the share of ||A||^2 that each of n directions captures, beyond the rank by extrapolation."""
        known = [max(value, 0.0) for value in self.captured]
        missing, rest = self.n - len(known), max(0.0, 1 - sum(known))
        return known + geometric(known[-1], rest, missing)


def joined(spectra: Sequence[Spectrum]) -> Spectrum:
    """Return one spectrum in the place of several, of one n, rank and share, that have to have one rank."""
    columns = zip(*(spectrum.captured for spectrum in spectra), strict=True)
    first, rows = spectra[0], sum(spectrum.rows for spectrum in spectra)
    mean = [sum(values) / len(spectra) for values in columns]
    return Spectrum(mean, first.n, rows, first.rank, first.share, len(spectra))


def geometric(first: float, total: float, count: int) -> list[float]:
    """Return ``first * ratio^k`` for k = 1 to ``count``, which sum to ``total``; equal ones where they would rise."""
    if count == 0:
        return []
    if total >= first * count:
        return [total / count] * count
    low, high = 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        reached = first * ratio * (1 - ratio**count) / (1 - ratio)
        low, high = (ratio, high) if reached < total else (low, ratio)
    return [first * ratio ** (k + 1) for k in range(count)]


def share_out(spectra: Sequence[Spectrum]) -> list[int]:
    """Return the new rank of each; where it would change by less than `QUANTUM`, the present one."""
    budget = sum(s.cost * s.even for s in spectra)
    ranks = [min(s.n, max(1, round(LEAST * s.even))) for s in spectra]
    spent = sum(s.cost * rank for s, rank in zip(spectra, ranks, strict=True))
    offers = []
    for index, (s, least) in enumerate(zip(spectra, ranks, strict=True)):
        values = s.whole()
        for start in range(least, s.n, QUANTUM):
            part = values[start : start + QUANTUM]
            worth = sum(part) / len(part) * s.n * s.rows / s.cost
            offers.append((worth, index, len(part)))
    for _, index, columns in sorted(offers, key=lambda offer: -offer[0]):
        price = columns * spectra[index].cost
        if spent + price <= budget:
            ranks[index] += columns
            spent += price
    return [s.rank if abs(rank - s.rank) < QUANTUM else rank for s, rank in zip(spectra, ranks, strict=True)]
