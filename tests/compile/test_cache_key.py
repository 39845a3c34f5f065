"""What torch's compile caches know a rewrite by: without compiling anything (`test_caches.py` does)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import oasis_fx
import oasis_fx.passes
import oasis_fx.runtime
from oasis_fx.compile.partitioner import JointPartitioner, sources_digest


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Copies of all packages' sources, which stand in for them; and the key that they give."""
    for package in (oasis_fx, oasis_fx.passes, oasis_fx.runtime):
        folder = tmp_path / package.__name__
        for place in map(Path, package.__path__):
            for file in place.rglob("*.py"):
                copy = folder / file.relative_to(place)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        monkeypatch.setattr(package, "__path__", [str(folder)])

    def key(*arguments) -> str:
        sources_digest.cache_clear()
        return JointPartitioner(*arguments or ((),)).uuid()

    yield tmp_path, key
    sources_digest.cache_clear()


def test_the_key_changes_with_any_source_of_ours(copied) -> None:
    folder, key = copied
    keys = [key()]
    files = sorted(folder.rglob("*.py"))
    names = {str(file.relative_to(folder)) for file in files}
    rooms = {"oasis_fx/compile/pipeline.py", "oasis_fx.passes/matchers/gradient_parts.py"}
    assert names > rooms | {"oasis_fx.runtime/gradients/in_graph.py", "oasis_fx/settings.py"}
    for file in files:
        whole = file.read_text()
        file.write_text(f"{whole}#")
        keys.append(key())
        file.write_text(whole)
    assert len(set(keys)) == len(keys) == len(files) + 1
    assert key() == keys[0]
