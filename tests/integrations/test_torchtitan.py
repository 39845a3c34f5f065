"""torchtitan's own trainer with our backend and optimizer: FSDP2, accumulation, clipping, checkpoints, resuming."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# `make setup` puts both beside the environment, not in it: other tests find neither.
BESIDE = [str(place) for name in ("torchtitan", "triton") if (place := Path(sys.prefix) / name).is_dir()]
HAS_TORCHTITAN = bool(importlib.util.find_spec("torchtitan")) or (Path(sys.prefix) / "torchtitan").is_dir()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not HAS_TORCHTITAN, reason="torchtitan is not installed: make setup installs it"),
]

ROUNDING = 1e-5
# The norm of the head's gradient is a sum of half a million squares in float32: stock torchtitan's differs as much.
ROUNDING_OF_NORMS = 3e-4


def job(folder: Path, ranks: int, *runs: str) -> dict[str, dict]:
    program = Path(__file__).with_name("torchtitan_program.py")
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    paths = [*BESIDE, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command += [str(program), str(folder), *runs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / f"of{ranks}.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every run there is, in two jobs: of one rank, and of two."""
    folder = tmp_path_factory.mktemp("torchtitan")
    with FileLock(tmp_path_factory.getbasetemp().parent / "distributed.lock"):
        alone = job(folder, 1, "seed", "whole", "accumulated", "loosely clipped", "whole resumed", "refused")
        return alone | job(folder, 2, "joint", "joint resumed", "joint after whole")


def alike(one: dict, other: dict, last: int | None = None) -> None:
    """Compare losses, norms, and how the subspaces did; of the last steps, where a number of them is given."""
    for key, tolerance in {"losses": ROUNDING, "norms": ROUNDING_OF_NORMS, "energy": 1e-4, "drift": 1e-4}.items():
        steps = len(one[key]) if last is None else last
        assert one[key][-steps:] == pytest.approx(other[key][-steps:], rel=tolerance), key
    assert one["weights"] == pytest.approx(other["weights"], rel=1e-5)


def test_two_ranks_train_as_one_on_the_joint_batch(found) -> None:
    """Each has the moments of its rows; low-rank gradients and statistics are what travels."""
    one, two = found["whole"], found["joint"]
    alike(one, two)
    assert one["losses"][-1] < 0.8 * one["losses"][0]
    assert (one["moments"], two["moments"]) == ([[256, 16], [768, 16]], [[128, 16], [384, 16]])
    assert 0 < two["sent"] < 0.17 * two["dense"]


def test_subspaces_are_among_the_metrics(found) -> None:
    """What stands in TensorBoard's place is sent them at each step, with torchtitan's own."""
    run = found["whole"]
    assert run["energy"][-1] > run["energy"][0] > 0 and 0 < run["drift"][-1] < run["drift"][0] < 1


def test_accumulation_is_one_large_batch(found) -> None:
    alike(found["whole"], found["accumulated"])


def test_clipping(found) -> None:
    """All norms are over the limit of the one run: the first loss after a step on it is another one."""
    clipped, loose = found["whole"], found["loosely clipped"]
    assert min(clipped["norms"]) > 0.5 and clipped["norms"][0] == loose["norms"][0]
    assert clipped["losses"][0] == loose["losses"][0] and clipped["losses"][-1] != pytest.approx(loose["losses"][-1])


@pytest.mark.parametrize("name", ["whole", "joint"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(found, name) -> None:
    run, resumed = found[name], found[f"{name} resumed"]
    assert resumed["steps"] == run["steps"][-len(resumed["steps"]) :] and len(resumed["steps"]) < len(run["steps"])
    for key in ("losses", "norms", "energy", "drift"):
        assert resumed[key] == run[key][-len(resumed[key]) :], key
    assert resumed["weights"] == run["weights"]


def test_a_run_goes_on_with_another_number_of_ranks(found) -> None:
    alike(found["whole"], found["joint after whole"], last=len(found["joint after whole"]["steps"]))


def test_what_does_not_go_together_is_refused(found) -> None:
    refused = found["refused"]
    assert "optimizer is 'AdamW': it must be one of OasisAdamW, OasisLion, OasisSGD" in refused["optimizer"]
    assert "config.model_spec is None" in refused["model"]
    assert "parallelism.tensor_parallel_degree is 2" in refused["tensor parallel"]
    assert "parallelism.spmd_backend is 'full_dtensor': it must be 'partial_dtensor'" in refused["mesh"]
    assert "compile.enable is False" in refused["eager"]
    assert "config.checkpoint is a OasisCheckpoints.Config" in refused["twice"]
    assert "it is one of another model" in refused["another model"]
