"""The pages of HTML: what they say, and that they need nothing else."""

from __future__ import annotations

import re
import tomllib

import pytest
import torch

from oasis_fx.inspect.estimate import estimate_dense
from oasis_fx.inspect.graphs import graphs
from oasis_fx.inspect.pages import report_page, saved_by_operator
from oasis_fx.inspect.report import report
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.memory.node_costs import readable_bytes
from oasis_fx.settings import Settings
from tests.inspect.pages_to_show import FOLDER, PAGES, blocks_report, llama_graphs, traced


def test_the_report_as_a_page() -> None:
    page = blocks_report().replace("<wbr>", "")
    records, _ = traced(f"{FOLDER}/two_blocks.py:build", exclude=["layers.1.down.*", "lm_head.*"])
    (found,) = report(records)
    for row in found.rows:
        assert f">{row.name}</td>" in page
    for skipped in found.skipped:
        assert skipped.reason.replace("'", "&#39;") in page
    assert "two blocks &amp; &lt;a head&gt;" in page and "<a head>" not in page
    assert page.count("<svg ") == 2 and "layers.0, before and after" in page
    # Light and dark, and no sum of a table left out.
    assert "prefers-color-scheme: dark" in page and "Adam (moments; moments, bases), MiB" in page


def test_the_module_to_draw_can_be_chosen() -> None:
    records, settings = traced(f"{FOLDER}/two_blocks.py:build")
    page = report_page(records, settings, title="x", only="lm_head")
    assert "lm_head, before and after" in page
    with pytest.raises(ValueError, match=r"belongs to 'layers\.9'"):
        report_page(records, settings, title="x", only="layers.9")


def test_what_a_dense_weight_would_have_saved() -> None:
    """The estimate for a weight that is left out is what leaving it out costs."""
    target = f"{FOLDER}/two_blocks.py:build"
    for name in ("layers.0.down.weight", "layers.1.up.weight"):
        without, settings = traced(target, exclude=[name, "lm_head.*"], stats=False)
        whole, _ = traced(target, stats=False)
        (shown,) = graphs(without)
        estimates = estimate_dense(shown, settings.rank_of)
        before, after = (report(records)[0].totals.saved_bytes_after for records in (without, whole))
        assert estimates[name].saved == before - after > 0
        assert set(estimates) == {name, "lm_head.weight"}
        cell = rf'<td class="number" data-of="would save">{re.escape(readable_bytes(before - after))}</td></tr>'
        page = report_page(without, settings, title="x").replace("<wbr>", "")
        assert re.search(rf">{re.escape(name)}</td>.*?{cell}", page)


def test_no_estimate_without_a_matmul_or_a_rank() -> None:
    records, settings = traced("tiny_llama")
    (shown,) = graphs(records)
    assert set(estimate_dense(shown, settings.rank_of)) == {"lm_head.weight"}  # the embedding is looked up
    assert estimate_dense(shown, lambda name, n: None) == {}
    # An activation that is an input of the graph is kept anyway.
    records, settings = traced(f"{FOLDER}/two_blocks.py:build", exclude=["layers.0.up.*"])
    (shown,) = graphs(records)
    found = estimate_dense(shown, settings.rank_of)["layers.0.up.weight"]
    assert (found.activation, found.saved) == (0, 0) and found.projection == 8 * (50 * 2 + 6 * 2)


@pytest.mark.parametrize("target", [f"{FOLDER}/two_blocks.py:build", "tiny_llama"])
def test_bars_add_up_to_the_total(target) -> None:
    records, _ = traced(target)
    (shown,) = graphs(records)
    bars = saved_by_operator(shown)
    totals = report(records)[0].totals
    assert sum(bar.before for bar in bars) == totals.saved_bytes_before
    assert sum(bar.after for bar in bars) == totals.saved_bytes_after
    assert max(bars[0].before, bars[0].after) == max(max(bar.before, bar.after) for bar in bars)
    by_name = {bar.operator: bar for bar in bars}
    assert by_name["mm +P"].before == 0 and ("other" in by_name) == ("llama" in target)
    if "blocks" in target:
        assert by_name["mm +P"].after == 4 * 8 * 50 * 2 and by_name["mm +C"].after == 2 * 8 * (6 + 8) * 2
        assert (by_name["sin"].before, by_name["sin"].after) == (2 * 8 * 50 * 8, 0)


def test_graphs_as_a_page() -> None:
    page = llama_graphs()
    assert page.count("<svg ") == page.count("<table>") == 4
    assert '<tr class="added saved">' in page and '<tr class="removed">' in page
    assert "self.q_proj(hidden_states)" in page.replace("<wbr>", "") and "layers_1" not in page


def test_a_model_without_weights_in_a_subspace_has_a_page() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    settings = Settings(rank=2, include=["0.*"], exclude=["0.*"])
    page = report_page(trace_model(model, torch.randn(2, 4), settings), settings, title="none")
    assert "no weight of this graph has a low-rank gradient" in page and "<svg" not in page


def test_templates_are_in_the_wheel() -> None:
    package = FOLDER.parents[1] / "oasis_fx" / "inspect"
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["package-data"]["oasis_fx.inspect"]
    templates = set(package.glob("templates/*"))
    assert templates and templates <= {file for glob in listed for file in package.glob(glob)}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_needs_nothing_from_elsewhere(page) -> None:
    text = PAGES[page]()
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|<link|https?://""", text)
