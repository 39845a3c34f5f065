"""The benchmark of the import time prints a ratio, and refuses what is no number of pairs."""

from __future__ import annotations

import re

import pytest

from benchmarks import import_time


def test_it_prints_the_median_of_ratios(capsys, monkeypatch) -> None:
    taken = iter(2 * [9.0, 9.0, 2.0, 2.2, 2.0, 2.0, 1.0, 3.0])  # the first of each is not counted
    monkeypatch.setattr(import_time, "_seconds", lambda statement: next(taken))
    import_time.main(["--pairs", "3"])
    lines = re.findall(r"to torch: 1\.10 \(median of 3 pairs, from 1\.00 to 3\.00\)", capsys.readouterr().out)
    assert len(lines) == 2
    with pytest.raises(ValueError, match="--pairs is 0: it must be a whole number from 1"):
        import_time.main(["--pairs", "0"])
