"""Drawings of benchmarks/results, which lie beside docs/ in the repository, as files of the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    for drawing in RESULTS.glob("*.svg"):
        files.append(File.generated(config, f"results/{drawing.name}", abs_src_path=str(drawing)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../benchmarks/results/", "](results/")
