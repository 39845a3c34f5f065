"""Torch's compile caches: right hits across processes, and no wrong ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Prints what one process compiled: whether the caches had it, and every gradient against dW @ Q.
SCRIPT = """
import copy, json, sys, torch
from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.graph.matricization import as_rows
arguments = json.loads(sys.argv[1])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 7)).double()
reference, x = copy.deepcopy(model), torch.randn(9, 12, dtype=torch.float64)
reference(x).square().sum().backward()
backend = oasis_backend(**arguments)
torch.compile(model, backend=backend)(x).square().sum().backward()
(record,) = backend.compiled_graphs()
factors = {}
for (name, weight), dense in zip(model.named_parameters(), reference.parameters()):
    if isinstance(weight.grad, LowRankGrad):
        ratio = weight.grad.factor / (as_rows(dense.grad, weight.grad.features) @ weight.grad.basis.detach())
        factors[name] = [weight.grad.factor.shape[1], float(ratio.min()), float(ratio.max())]
trace = record.trace or record.retrace()
print(json.dumps({"hit": record.trace is None, "factors": factors, "rewritten": len(trace.sites)}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, laid out as the wheel does, that a test may edit."""
    root = tmp_path_factory.mktemp("site")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "oasis_fx", root / "oasis_fx", ignore=ignore)
    for folder in ("passes", "runtime"):
        shutil.copytree(ROOT / folder, root / "oasis_fx" / folder, ignore=ignore)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor_cache")


def run(site: Path, cache: Path, **arguments: object) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(site), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(arguments)],
        env=environment,
        cwd=site,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_exact(result: dict, rank: int, names: set[str], scale: float = 1.0) -> None:
    assert set(result["factors"]) == names
    for columns, low, high in result["factors"].values():
        assert columns == rank
        assert abs(low - scale) < 1e-6 and abs(high - scale) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("subspace", ["pca", "gradient_svd"])
def test_a_basis_that_goes_by_the_batch_is_found_from_a_warm_cache(site: Path, cache: Path, subspace: str) -> None:
    """Its operator is told a handle, which means another subspace in each process."""
    results = [run(site, cache, rank=4, subspace=subspace) for _ in range(2)]
    assert [result["hit"] for result in results] == [False, True]
    for result in results:
        assert_exact(result, 4, {"0.weight", "2.weight"})
    assert results[0]["factors"] == results[1]["factors"]


@pytest.mark.slow
def test_caches(site: Path, cache: Path) -> None:
    both = {"0.weight", "2.weight"}
    cold = run(site, cache, rank=3)
    assert not cold["hit"]
    assert_exact(cold, 3, both)

    warm = run(site, cache, rank=3)
    assert warm["hit"]  # the passes did not run, and still:
    assert_exact(warm, 3, both)
    assert warm["rewritten"] == 2  # the report traces again

    other_rank = run(site, cache, rank=5)
    assert not other_rank["hit"]
    assert_exact(other_rank, 5, both)

    other_targets = run(site, cache, rank=3, include=["2.*"])
    assert not other_targets["hit"]
    assert_exact(other_targets, 3, {"2.weight"})

    other_budget = run(site, cache, rank=3, memory_budget=0.5)
    assert not other_budget["hit"]
    assert_exact(other_budget, 3, both)

    edited = site / "oasis_fx" / "passes" / "low_rank_gradients.py"
    text = edited.read_text()
    line = "set_output(graph, positions[site.inputs.slot], _stacked(graph, parts, site.rows))"
    assert line in text
    doubled = (
        "total = _stacked(graph, parts, site.rows)\n"
        "        total = insert_after(graph, total, aten.mul.Tensor, total, 2.0)\n"
        "        set_output(graph, positions[site.inputs.slot], total)"
    )
    edited.write_text(text.replace(line, doubled))
    after_edit = run(site, cache, rank=3)
    assert not after_edit["hit"]
    assert_exact(after_edit, 3, both, scale=2.0)
    edited.write_text(text)
