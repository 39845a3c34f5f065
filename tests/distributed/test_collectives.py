"""Collectives on low-rank gradients, on two ranks: what each leaves is what it leaves of dense ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("collectives_program.py")


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("collectives")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(PROGRAM), str(folder)], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("bases", ["one basis", "two bases"])
def test_they_are_right_whether_ranks_share_a_basis_or_not(on_ranks, bases) -> None:
    """A broadcast is one of the factor where the basis is one."""
    for rank in on_ranks:
        ways = {name: found for name, found in rank.items() if name.endswith(bases)}
        assert len(ways) == 21
        for name, found in ways.items():
            assert isinstance(found, list), (name, found)
            error, low_rank = found
            assert error < 1e-12, (name, error)
            if name.startswith("broadcast"):
                assert low_rank == (bases == "one basis"), name
