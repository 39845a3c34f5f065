"""What torch's compile caches know a rewrite by: without compiling anything (`test_caches.py` does)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import oasis_fx
import oasis_fx.passes
from oasis_fx.partitioner import JointPartitioner, sources_digest


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Copies of both packages' sources, which stand in for them; and the key that they give."""
    for package in (oasis_fx, oasis_fx.passes):
        folder = tmp_path / package.__name__
        folder.mkdir()
        for file in (f for place in package.__path__ for f in Path(place).glob("*.py")):
            shutil.copyfile(file, folder / file.name)
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
    assert {file.parent.name for file in files} == {"oasis_fx", "oasis_fx.passes"} and len(files) > 30
    for file in files:
        whole = file.read_text()
        file.write_text(f"{whole}#")
        keys.append(key())
        file.write_text(whole)
    assert len(set(keys)) == len(keys) == len(files) + 1
    assert key() == keys[0]
