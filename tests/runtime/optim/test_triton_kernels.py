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

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not BESIDE.is_dir(), reason="needs Triton: make setup"
)


@pytest.mark.parametrize(("what", "interpreted"), [("interpret", "1"), ("build", "0")])
def test_kernels(what, interpreted, tmp_path) -> None:
    path = os.pathsep.join([str(BESIDE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpreted, "TRITON_CACHE_DIR": str(tmp_path)}
    program = Path(__file__).with_name("triton_program.py")
    done = subprocess.run(
        [sys.executable, "-P", str(program), what], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_a_kernel_runs_where_its_weight_is() -> None:
    assert device_guard(torch.device("cuda", 1)).idx == 1
    with device_guard(torch.device("cpu")):
        pass
