"""The folders at the top install as sub-packages of oasis_fx, and as nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_sub_package_is_listed() -> None:
    # One that is not would import in the editable install and be missing from the wheel.
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    found = set()
    for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    assert listed == found


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_top_level_folders_refuse_to_be_imported_by_themselves(folder: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"import this package as oasis_fx.{folder}, not as {folder}" in run.stderr


def test_importing_the_package_does_not_load_inductor() -> None:
    code = "import sys, oasis_fx; sys.exit('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0


def test_the_pypi_package_functorch_is_no_dependency() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    requirements = [*PROJECT["project"]["dependencies"], *(r for extra in extras for r in extra)]
    assert not any(requirement.startswith("functorch") for requirement in requirements)


def test_torch_finds_the_backend_by_name() -> None:
    (entry,) = entry_points(group="torch_dynamo_backends", name="oasis")
    assert entry.load().__name__ == "oasis"


def test_importing_the_package_does_not_load_dynamo() -> None:
    # It takes seconds, which `oasis-fx --help` and a bad argument should not wait for.
    code = "import sys, oasis_fx.__main__; assert 'torch._dynamo' not in sys.modules; oasis_fx.OasisAdamW"
    subprocess.run([sys.executable, "-c", code], check=True)
