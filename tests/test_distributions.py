"""The wheel and the source distribution hold what they should, and the wheel's commands run in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="it builds the packages")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_sdist(out), b.build_wheel(out)"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Source distribution and wheel, built from a copy, in which nothing is left from other builds."""
    folder = tmp_path_factory.mktemp("distributions")
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    names = [name for name in kept if name] or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        if not name.startswith(("tests/", "benchmarks/")) or name.endswith("8x512-r32-cpu.svg"):
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, folder / "tree" / name)
    out = folder / "dist"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=folder / "tree", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


def test_the_source_distribution_has_examples_and_pages(built) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, ending in (("examples", "*.py"), ("examples", "*.ipynb"), ("docs", "*.md"), ("docs", "figures/*.svg")):
        files = {str(file.relative_to(ROOT)) for file in (ROOT / folder).glob(ending)}
        assert files and files <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_wheel_has_every_module_and_nothing_else(built) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    own = {name for name in names if ".dist-info/" not in name}
    expected = set()
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        if "." not in package.removeprefix("oasis_fx."):
            place = package.replace(".", "/")
            expected |= {f"{place}/{file.relative_to(ROOT / folder)}" for file in (ROOT / folder).rglob("*.py")}
    data = {f"oasis_fx/inspect/templates/{file.name}" for file in (ROOT / "oasis_fx/inspect/templates").iterdir()}
    assert own == expected | data | {"oasis_fx/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"Version: {PROJECT['project']['version']}" in metadata and "License-Expression: BSD-3-Clause" in metadata


def test_commands_of_the_wheel_run_in_another_folder(built, tmp_path) -> None:
    place, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(place)
    program = (
        "import oasis_fx, sys; from oasis_fx.__main__ import main; print(oasis_fx.__file__);"
        "sys.exit(main(['explain', 'mlp', '--rank', '4', '--html', 'page.html'])"
        " or main(['print', 'mlp', '--rank', '4', '--graph', 'after']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(place)) and "0.weight" in done.stdout and "def joint(" in done.stdout
    assert "<svg " in (elsewhere / "page.html").read_text()
