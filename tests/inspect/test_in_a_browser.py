"""Pages as a browser shows them, on a wide screen, on a narrow one and on a phone: nothing is cut off."""

from __future__ import annotations

import pytest

from tests.inspect.browser import BROWSER, REASON, measure
from tests.inspect.pages_to_show import PAGES

WIDTHS = (1280, 800, 400)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=REASON)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off(name, tmp_path) -> None:
    page = PAGES[name]()
    for width, found in zip(WIDTHS, measure(page, WIDTHS, tmp_path), strict=True):
        assert found["width"] == width and found["needed"] <= width, f"{width}: the page needs {found['needed']}"
        assert found["cut"] == [] and found["texts"] == [], f"at {width} pixels"
        assert found["drawings"] == page.count("<svg ")


def test_what_is_cut_off_is_found(tmp_path) -> None:
    """The measurement sees a table and a text that do not fit, or the test above would say nothing."""
    page = (
        '<div class="scroll" style="overflow: auto"><table><tr><td style="white-space: nowrap">'
        + "wide " * 100
        + "</td>"
        '</tr></table></div><p style="width: 20px; white-space: nowrap">stands out</p>'
        '<svg><g class="box"><rect width="10" height="10"/><text>runs over</text></g></svg>'
    )
    (found,) = measure(page, [400], tmp_path)
    assert len(found["cut"]) == 1 and found["texts"] == ["stands out", "runs over"]
