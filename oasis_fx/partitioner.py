"""The pipeline as Inductor's `custom_partitioner_fn`, with a cache key that covers all that it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

import oasis_fx
import oasis_fx.passes
from oasis_fx.graph import LiftedWeight
from oasis_fx.pipeline import partition_joint
from oasis_fx.torch_private import CustomPartitionerFn


class JointPartitioner(CustomPartitionerFn):  # type: ignore[misc]
    """Rewrites and partitions the joint graph of one compile.

    Torch pickles the object into the keys of its caches: its attributes must be plain, and equal for
    equal graphs. On a cache hit it is never called.
    """

    def __init__(self, lifted: Sequence[LiftedWeight], budget: int | float | None = None) -> None:
        self.lifted, self.budget = tuple(lifted), budget

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        return partition_joint(gm, joint_inputs, lifted=self.lifted, budget=self.budget, **kwargs)

    def uuid(self) -> str:
        """Identity of this rewrite: the passes' sources and what they are asked to rewrite."""
        return hashlib.sha256(f"{sources_digest()} {self.lifted!r} {self.budget!r}".encode()).hexdigest()


@cache
def sources_digest() -> str:
    """Hash of every source file that can change what a compiled graph computes."""
    folders = [Path(p) for package in (oasis_fx, oasis_fx.passes) for p in package.__path__]
    digest = hashlib.sha256()
    for file in sorted((f for folder in folders for f in folder.glob("*.py")), key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
