"""Show a page in Chromium, and measure what stands out of its place."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
REASON = "no Chromium is installed here, and only a browser knows how wide its texts are"
_OFFLINE = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)
# A window has a least width, a frame has none; --dump-dom shows what the script leaves in the document. A text stands
# out where the box of its letters is not within that of the element that is to hold it.
_FRAMES = """<body>%s<script>
const texts = root => [...root.querySelectorAll("td, th, h1, h2, p, label, .number, .operator")];
const letters = element => {
  const range = element.ownerDocument.createRange();
  range.selectNodeContents(element);
  return range.getBoundingClientRect();
};
const standsOut = element => {
  const inner = letters(element), outer = element.getBoundingClientRect();
  return inner.width > 0 && (inner.left < outer.left - 1 || inner.right > outer.right + 1);
};
onload = () => {
  document.body.dataset.found = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const shown = frame.contentDocument, root = shown.scrollingElement;
    const boxes = [...shown.querySelectorAll("svg g.box")].flatMap(box => {
      const place = box.querySelector("rect").getBBox();
      return [...box.querySelectorAll("text")].filter(text => text.getBBox().width > place.width - 2);
    });
    return {
      width: frame.contentWindow.innerWidth,
      needed: root.scrollWidth,
      drawings: shown.querySelectorAll("svg").length,
      cut: [...shown.querySelectorAll(".scroll")].filter(part => part.scrollWidth > part.clientWidth + 1)
        .map(part => `${part.scrollWidth} of ${part.clientWidth}: ${part.textContent.trim().slice(0, 60)}`),
      texts: [...texts(shown).filter(standsOut), ...boxes].map(element => element.textContent),
    };
  }));
};
</script></body>"""


def measure(page: str, widths: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """Show a page at several widths, in pixels, and return what was found at each.

    Returns:
        For each width what the page needed of it, how many drawings it has, what has to be scrolled sideways, and the
        texts that do not fit their place.
    """
    frames = "".join(
        f'<iframe srcdoc="{escape(page)}" style="width: {width}px; height: 900px; border: 0"></iframe>'
        for width in widths
    )
    return _found(_FRAMES % frames, folder)


_DRAWING = """<body>%s<script>
onload = () => {
  const drawing = document.querySelector("svg"), room = drawing.getBoundingClientRect();
  document.body.dataset.found = JSON.stringify([...drawing.querySelectorAll("text, rect")].filter(part => {
    const place = part.getBoundingClientRect();
    return place.left < room.left || place.right > room.right || place.top < room.top || place.bottom > room.bottom;
  }).map(part => part.textContent || part.outerHTML));
};
</script></body>"""


def drawing_fits(drawing: Path, folder: Path) -> list[str]:
    """Return what of an SVG file stands out of it."""
    return _found(_DRAWING % drawing.read_text(encoding="utf-8"), folder)


def _found(page: str, folder: Path) -> Any:
    (folder / "frames.html").write_text(page, encoding="utf-8")
    shown = subprocess.run(
        [str(BROWSER), *_OFFLINE, f"--user-data-dir={folder}/profile", "--window-size=1400,1000",
         "--enable-logging=stderr", "--dump-dom", f"file://{folder}/frames.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert ":CONSOLE" not in shown.stderr, shown.stderr
    found = re.search(r'data-found="([^"]*)"', shown.stdout)
    assert found, shown.stdout[-2000:]
    return json.loads(unescape(found[1]))
