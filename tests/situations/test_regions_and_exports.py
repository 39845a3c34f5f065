"""Programs that other tools of torch made or take: nested regions, exported programs, saved code, saved packages."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oasis_fx import oasis_backend


class Region(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 12), torch.nn.Linear(12, 8)

    @torch.compiler.nested_compile_region
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("count", [1, 3])
def test_every_block_of_a_nested_compile_region_is_rewritten(kit, count) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(Region() for _ in range(count))).double()
    reference = copy.deepcopy(model)
    kit.backward(reference, kit.batch())
    compiled = kit.compile_eager(model, fullgraph=True)
    kit.backward(compiled.run, kit.batch())
    assert kit.count_low_rank(model, reference) == 2 * count
    assert len({id(weight.grad.subspace) for weight in model.parameters() if weight.dim() == 2}) == 2 * count


def test_an_exported_program_is_rewritten(kit) -> None:
    model = torch.export.export(kit.Net(), (kit.batch(),)).module()
    reference = copy.deepcopy(model)
    kit.backward(reference, kit.batch())
    compiled = kit.compile_eager(model)
    kit.backward(compiled.run, kit.batch())
    assert kit.count_low_rank(model, reference) == 4


def test_aot_compile_is_refused_by_name(kit) -> None:
    with torch._dynamo.config.patch(enable_aot_compile=True):
        compiled = torch.compile(kit.Net(), backend=oasis_backend(rank=3, inner="aot_eager"), fullgraph=True)
        with pytest.raises(RuntimeError, match=r"aot_compile saves compiled code alone.*torch's own"):
            compiled.forward.aot_compile(((kit.batch(),), {}))


PROGRAM = """
import torch
from oasis_fx import LowRankGrad, oasis_backend
torch._dynamo.config.caching_precompile = True
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
torch.compile(model, backend=oasis_backend(rank=3))(torch.ones(5, 6)).square().sum().backward()
assert isinstance(model[0].weight.grad, LowRankGrad)
print(model[0].weight.grad.factor.norm().item(), torch._dynamo.utils.counters["dynamo_cache"])
torch.compiler.save_cache_artifacts()  # writes what Dynamo compiled, as well
"""


@pytest.mark.slow
def test_caching_precompile_in_a_warm_process(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-P", "-c", PROGRAM], env=environment, capture_output=True, text=True)
        for _ in "ab"
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
    cold, warm = (run.stdout.split(" ", 1) for run in runs)
    assert cold[0] == warm[0]
    assert "dynamo_cache_hit" in warm[1] and "dynamo_cache_hit" not in cold[1]
