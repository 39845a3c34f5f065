"""The Python of README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_program_of_the_readme_trains_in_subspaces() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch._dynamo.reset()
    seen: dict[str, object] = {}
    exec(program, seen)
    weight, optimizer = next(seen["model"].parameters()), seen["optimizer"]  # type: ignore[attr-defined]
    assert optimizer.state[weight]["exp_avg"].shape == (256, 16)  # type: ignore[attr-defined]
