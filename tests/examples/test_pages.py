"""The Python of README and of docs/ runs as it stands.

A block that cannot run says why in a comment before its fence, `<!-- not run: REASON -->`, and has to compile.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"^(?: *<!-- not run: (?P<reason>[^\n]+) -->\n)?(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page(page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python"), f"{page} has a fence that is not closed at its own indentation"
    programs = []
    for block in blocks:
        code = dedent(block["code"])
        compile(code, page, "exec")
        if block["reason"] is None:
            programs.append(code)
    if not programs:
        return
    # A page is one program: later blocks use names of earlier ones. It may register a rule, so it has its own process.
    program = tmp_path / "page.py"
    program.write_text("\n".join(programs))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::UserWarning:__main__", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{page}:\n{done.stderr}"


def test_pages_with_python_are_found() -> None:
    assert {"README.md", "docs/quickstart.md"} <= set(PAGES)
