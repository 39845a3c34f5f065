"""The pages that tests look at: each is made once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from oasis_fx.cli.targets import load_target
from oasis_fx.inspect.graphs import graphs
from oasis_fx.inspect.pages import graphs_page, report_page
from oasis_fx.inspect.tracing import trace_model
from oasis_fx.settings import Settings

FOLDER = Path(__file__).parent


def traced(target: str, **settings):
    """Compile the model of a target without generating code, at rank 2; return the records and the settings."""
    model, inputs = load_target(target)
    given = Settings(rank=2, **settings)
    return trace_model(model, inputs, given), given


@cache
def blocks_report() -> str:
    records, settings = traced(f"{FOLDER}/two_blocks.py:build", exclude=["layers.1.down.*", "lm_head.*"])
    return report_page(records, settings, title="two blocks & <a head>")


@cache
def llama_report() -> str:
    records, settings = _llama()
    return report_page(records, settings, title="tiny_llama")


@cache
def llama_graphs() -> str:
    return graphs_page(graphs(_llama()[0]), title="tiny_llama", only="layers.0")


@cache
def _llama():
    return traced("tiny_llama")


PAGES = {"report": llama_report, "graphs": llama_graphs, "blocks": blocks_report}
