"""Each row of what oasis_fx offers, in docs/expectations.md, names files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "expectations.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| .+ \| (`.+`) \|$", PAGE[PAGE.index("## What oasis_fx offers") :], re.MULTILINE)


@pytest.mark.parametrize(("need", "shown_by"), ROWS)
def test_a_row_is_shown_by_files_that_exist(need, shown_by) -> None:
    files = re.findall(r"`([^`]+)`", shown_by)
    assert files and all((ROOT / file).is_file() for file in files), f"{need}: {files}"


def test_every_row_names_what_shows_it() -> None:
    rows = PAGE[PAGE.index("| need |") : PAGE.index("What they have")].strip().splitlines()
    assert len(ROWS) == len(rows) - 2 >= 14


def test_the_names_of_optimizers_are_those_of_transformers() -> None:
    names = pytest.importorskip("transformers.training_args").OptimizerNames
    given = re.findall(r'`optim="(\w+)"`', PAGE)
    assert len(given) == 3 and set(given) <= {name.value for name in names}
