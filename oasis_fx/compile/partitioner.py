"""The pipeline as a partitioner of AOTAutograd and Inductor, with a cache key that covers all that it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import fx

import oasis_fx
import oasis_fx.passes
import oasis_fx.runtime
from oasis_fx._torch.compiler import CustomPartitionerFn
from oasis_fx.compile.joint import partition_joint
from oasis_fx.graph.facts import LiftedWeight


class JointPartitioner(CustomPartitionerFn):  # type: ignore[misc]
    """Rewrites and partitions the joint graph of one compile, under Inductor and under ``aot_eager``.

    Torch pickles the object into the keys of its caches: its attributes must be plain, and equal for
    equal graphs. On a cache hit it is never called.
    """

    def __init__(self, lifted: Sequence[LiftedWeight], budget: int | float | None = None) -> None:
        self.lifted, self.budget = tuple(lifted), budget

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> Any:
        return partition_joint(gm, joint_inputs, lifted=self.lifted, budget=self.budget, **kwargs)

    def uuid(self) -> str:
        """Return the identity of this rewrite: a hash of our sources and of what the passes are asked to rewrite."""
        return hashlib.sha256(f"{sources_digest()} {self.lifted!r} {self.budget!r}".encode()).hexdigest()


@cache
def sources_digest() -> str:
    """Hash all source files of ours by the names of their modules: a wheel and an editable install have one hash."""
    sources: dict[str, bytes] = {}
    for package in (oasis_fx, oasis_fx.passes, oasis_fx.runtime):
        for folder in map(Path, package.__path__):
            for file in folder.rglob("*.py"):
                sources[".".join((package.__name__, *file.relative_to(folder).parts))] = file.read_bytes()
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()
