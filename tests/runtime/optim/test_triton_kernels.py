"""The kernels of optimizer steps, without a GPU: in Triton's interpreter, and built for GPUs that are not here.

In a process of its own: Triton decides at import whether it interprets. `make setup` puts it beside the environment,
not into it, since Inductor behaves otherwise where it finds one.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oasis_fx.runtime.optim.kernels.dispatch import device_guard

BESIDE = Path(sys.prefix) / "triton"

beside_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not BESIDE.is_dir(), reason="needs Triton: make setup"
)


def run(program: str, *arguments: str, interpreted: bool, cache: Path) -> None:
    path = os.pathsep.join([str(BESIDE), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "TRITON_INTERPRET": str(int(interpreted)), "TRITON_CACHE_DIR": str(cache)}
    # The folder of the program is where it finds its own modules.
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@beside_triton
@pytest.mark.slow
@pytest.mark.parametrize("what", ["numbers", "training"])
def test_kernels_in_the_interpreter(what, tmp_path) -> None:
    run("triton_program.py", what, interpreted=True, cache=tmp_path)


@beside_triton
@pytest.mark.slow
def test_instructions_an_entry(tmp_path) -> None:
    run("instructions_program.py", interpreted=False, cache=tmp_path)


def test_a_kernel_runs_where_its_weight_is() -> None:
    assert device_guard(torch.device("cuda", 1)).idx == 1
    with device_guard(torch.device("cpu")):
        pass
