"""The chart of a plan: the limit has its label, and bars have their sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from oasis_fx.plan.chart import draw_chart
from oasis_fx.plan.memory import KINDS


@pytest.mark.parametrize("limit", [None, 1 << 30, 8 << 30])
def test_the_limit_is_named_at_its_line(limit, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    memory = SimpleNamespace(bytes_of=dict.fromkeys(KINDS, 1 << 29), total=len(KINDS) << 29)
    draw_chart([SimpleNamespace(name="stock", memory=memory)], "a title", str(tmp_path / "chart.svg"), limit)
    text = (tmp_path / "chart.svg").read_text()  # matplotlib notes each text that it draws as a comment
    assert f"<!--  {len(KINDS) / 2:.1f} -->" in text
    assert text.count("GiB  -->") == (limit is not None)
    if limit is not None:
        assert f"<!--  {limit >> 30}.0 GiB  -->" in text
