"""When two tensors are the same, and what is said where they are not."""

from __future__ import annotations

import torch

from fuzz.program import Program


class Wrong(Exception):
    """Something differs; the arguments are what, and by how much."""


def tolerance(program: Program) -> float:
    if "autocast" in program.features():
        return 0.06
    if program.options.dtype == "bfloat16":
        return 0.06
    if program.options.dtype == "float32":
        return 2e-4
    lossy = any(".float()" in statement.text for statement in program.statements())
    return 1e-5 if lossy else 1e-9


class Comparison:
    def __init__(self, program: Program, counts: dict[str, int]) -> None:
        self.close, self.counts = tolerance(program), counts

    def __call__(self, kind: str, name: str, found: torch.Tensor | None, right: torch.Tensor | None) -> None:
        """Raise `Wrong` where two tensors differ; None is zero."""
        self.count(kind)
        if found is None and right is None:
            return
        found = torch.zeros_like(right) if found is None else found.detach()
        right = torch.zeros_like(found) if right is None else right.detach()
        if found.shape != right.shape:
            raise Wrong(kind, f"{name}: {tuple(found.shape)} where {tuple(right.shape)} is right")
        error = self.error(found, right)
        if not error <= self.close:
            raise Wrong(kind, f"{name}: off by {error:.3g}")

    def count(self, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1

    def missed(self, kind: str) -> None:
        """Note a comparison that was not made, since the right value is not known."""
        self.count(f"not compared: {kind}")

    def error(self, found: torch.Tensor, right: torch.Tensor) -> float:
        found, right = found.double(), right.double()
        if not found.numel():
            return 0.0
        return float((found - right).norm()) / (1 + float(right.norm()))
