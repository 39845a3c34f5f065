"""examples/quickstart.ipynb is a valid notebook, runs from top to bottom, and shows what it shows today."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
# Cells run in one namespace, as in a kernel; a line between them parts what each prints.
RUNNER = """
import json, sys
space = {"__name__": "__main__"}
for source in json.load(open(sys.argv[1])):
    exec(compile(source, "cell", "exec"), space)
    print("\\0")
"""


def kind(text: str) -> list[str]:
    """A text without what varies: numbers, and the lines and rulers whose width goes with them."""
    lines = (" ".join(re.sub(r"-?\d[\d.,]*(e[-+]?\d+)?", "0", line).split()) for line in text.splitlines())
    return [line for line in lines if line.strip("- ")]


def test_it_is_a_valid_notebook() -> None:
    """What the format's schema asks for in version 4.5; nbformat is not among our dependencies."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    names = [cell["id"] for cell in CELLS]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    for cell in CELLS:
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (wanted | {"execution_count", "outputs"} if cell["cell_type"] == "code" else wanted)
        assert all(isinstance(line, str) for line in cell["source"])
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for output in (output for cell in CODE for output in cell["outputs"]):
        assert set(output) == {"name", "output_type", "text"} and output["output_type"] == "stream"


def test_its_cells_run_and_print_what_they_show(tmp_path) -> None:
    (tmp_path / "cells.json").write_text(json.dumps(["".join(cell["source"]) for cell in CODE]))
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::UserWarning:__main__", "-c", RUNNER, str(tmp_path / "cells.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    for cell, printed in zip(CODE, done.stdout.split("\0\n"), strict=False):
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert kind(printed) == kind(shown), "run the notebook anew and keep its outputs"
    first, last = map(float, re.search(r"loss at first ([\d.]+), at last ([\d.]+)", done.stdout).groups())
    assert last < first / 5
    assert float(re.search(r"optimizer states, oasis_fx to stock: ([\d.]+)", done.stdout)[1]) < 0.5
