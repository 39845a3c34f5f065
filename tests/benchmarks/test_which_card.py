"""docs/which_card.md has what was planned, and its commands are ones that the command line takes."""

from __future__ import annotations

import json
import shlex

import pytest

pytest.importorskip("transformers")

from benchmarks import which_card
from oasis_fx.cli.parser import make_parser
from oasis_fx.memory.sizes import parse_bytes


def test_the_page_has_what_was_planned() -> None:
    found, page = json.loads(which_card.RESULT.read_text()), which_card.PAGE.read_text()
    assert list(found) and which_card.page_with(found, page) == page, "python -m benchmarks.which_card writes it anew"
    for model, rows in found.items():
        assert [row["card"] for row in rows] == list(which_card.FITS)
        for row in rows:
            limit = parse_bytes(row["size"])
            assert limit is not None and limit <= 0.9 * row["card"] * 2**30
            assert row["fits"] == (sum(row["bytes"].values()) <= limit)
            make_parser().parse_args(shlex.split(which_card.command_of(model, row["size"]))[1:])


@pytest.mark.slow
def test_a_row_is_what_the_planner_finds() -> None:
    found = json.loads(which_card.RESULT.read_text())["SmolLM2-135M"]
    (row,) = which_card.planned("SmolLM2-135M", {8: which_card.FITS[8]})
    assert row == next(one for one in found if one["card"] == 8)
