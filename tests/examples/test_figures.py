"""The figures of README and docs/method.md are what benchmarks/method_figures.py draws, and pages show all of them."""

from __future__ import annotations

import re

import pytest

from benchmarks import method_figures
from tests.inspect.browser import BROWSER, REASON, drawing_fits

ANEW = "python -m benchmarks.method_figures draws it anew"


@pytest.mark.parametrize("name", method_figures.DRAWN)
def test_a_figure_is_what_the_program_draws(name) -> None:
    assert (method_figures.FIGURES / f"{name}.svg").read_text() == method_figures.DRAWN[name](), ANEW


@pytest.mark.slow
def test_the_graph_is_what_the_command_draws() -> None:
    pytest.importorskip("transformers")
    assert (method_figures.FIGURES / "graph.svg").read_text() == method_figures.graph(), ANEW


def test_every_figure_is_shown() -> None:
    page = (method_figures.FIGURES.parent / "method.md").read_text()
    shown = set(re.findall(r"\]\(figures/(\w+)\.svg\)", page))
    assert shown == {*method_figures.DRAWN, "graph"} == {file.stem for file in method_figures.FIGURES.iterdir()}


@pytest.mark.skipif(BROWSER is None, reason=REASON)
def test_no_text_stands_out_of_a_figure(tmp_path) -> None:
    for file in method_figures.FIGURES.iterdir():
        assert drawing_fits(file, tmp_path) == [], file.name
