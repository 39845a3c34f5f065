"""Starts jobs of several ranks on this machine, and reads what they have found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def torchrun(program: str, *arguments: str | Path, world: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder on that many ranks; each has one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone"]
    command += [str(Path(__file__).with_name(program)), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def result(program: str, case: str, folder: Path, world: int = 2) -> dict[str, Any]:
    """Run one case of a program, which must not fail, and return what it has written to ``folder/result.json``."""
    done = torchrun(program, case, folder, world=world)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "result.json").read_text())


def results_of_ranks(program: str, folder: Path, world: int = 2) -> list[dict[str, Any]]:
    """Run all of a program, which must not fail, and return what each rank has written to ``folder/rankN.json``."""
    done = torchrun(program, folder, world=world)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]
