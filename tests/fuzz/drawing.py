"""A program while it is drawn: its parameters and variables, each with the tensor that it stands for."""

from __future__ import annotations

import operator
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fuzz.program import Parameter, Read, Statement

_LARGEST = 160  # entries of a variable
_NAMES = {"torch": torch, "F": F, "operator": operator, "checkpoint": checkpoint}


def _nonleaf(x: torch.Tensor) -> torch.Tensor:
    return x.requires_grad_() * 1


class Drawing:
    """What statements are drawn from.

    Attributes:
        half: whether regions of autocast are drawn; all is float32 then, since autocast leaves float64 alone.
        sizes: lengths of feature dimensions, few, so that weights fit to many activations.
        env: every name that a statement may use, with its value.
        shown: variables that may be read, the oldest first.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        kind = rng.random()
        self.half = kind < 0.1  # autocast leaves float64 alone
        self.dtype = torch.float32 if self.half else torch.bfloat16 if kind > 0.97 else torch.float64
        self.sizes = [*rng.sample([1, 2, 3, 4, 4, 6, 6, 8], 2), rng.choice([4, 6])]
        self.net = torch.nn.Module()
        self.empty = rng.random() < 0.03
        if self.empty:  # batches without rows, weights without features
            self.sizes[0] = rng.choice([0, self.sizes[0]])
        self.env: dict[str, Any] = {**_NAMES, "self": self.net, "randn": self.randn, "nonleaf": _nonleaf, "number": 0}
        self.shown: list[str] = []  # variables in the order in which they were made
        self.parameters: list[Parameter] = []
        self.inputs: list[Parameter] = []
        self.count = 0

    def randn(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=self.dtype)

    def fresh(self, kind: str) -> str:
        self.count += 1
        return f"{kind}{self.count}"

    def parameter(self, kind: str, make: str) -> str:
        name = self.fresh(kind)
        self.parameters.append(Parameter(name, make))
        setattr(self.net, name, eval(make, self.env))
        return name

    def weight(self, *size: int) -> str:
        """A new weight; seldom frozen, laid out the other way round, or another under a second name."""
        draw, text = self.rng.random(), ", ".join(map(str, size))
        equal = [p.name for p in self.parameters if p.name[0] == "w" and getattr(self.net, p.name).shape == size]
        if equal and draw > 0.8:
            return self.parameter("w", f"self.{self.rng.choice(equal)}")
        if draw < 0.06 and len(size) == 2:
            made = f"randn({size[1]}, {size[0]}).t()"
        elif draw < 0.1 and len(size) == 4:
            made = f"randn({text}).to(memory_format=torch.channels_last)"
        else:
            made = f"randn({text})"
        end = ", requires_grad=False" if draw > 0.96 else ""
        return self.parameter("w", f"torch.nn.Parameter({made} / 2{end})")

    def vector(self, kind: str, n: int) -> str:
        """A bias or a buffer of that length; an old one if there is one."""
        known = [p.name for p in self.parameters if p.name[0] == kind and getattr(self.net, p.name).shape == (n,)]
        if known and self.rng.random() < 0.7:
            return f"self.{self.rng.choice(known)}"
        make = f"torch.nn.Parameter(randn({n}))" if kind == "b" else f"torch.nn.Buffer(randn({n}))"
        return f"self.{self.parameter(kind, make)}"

    def tensors(self, least: int = 1, most: int = 9) -> list[str]:
        """Variables of floating point and so many dimensions, the newest last."""
        return [name for name in self.shown if least <= self.env[name].dim() <= most and self.fits(name)]

    def fits(self, name: str) -> bool:
        return self.empty or self.env[name].numel() > 0

    def pick(self, least: int = 1, most: int = 9) -> str | None:
        known = self.tensors(least, most)
        if not known:
            return None
        return known[-1] if self.rng.random() < 0.6 else self.rng.choice(known)

    def run(self, text: str, makes: str | None, reads: tuple[Read, ...] = (), *features: str) -> Statement | None:
        """Run a statement; None where it raises, or makes what is no small finite tensor."""
        before = {name: self.env[name] for name in self.shown}
        try:
            exec(text, self.env)
            if makes is not None:
                if not self.is_taken(self.env[makes]):
                    raise ValueError("not drawn")
        except Exception:
            self.env.update(before)
            self.env.pop(makes, None)
            return None
        if makes is not None and makes not in self.shown:
            self.shown.append(makes)
        return Statement(text, makes, reads, features=frozenset(features))

    def is_taken(self, made: Any) -> bool:
        """Whether what a statement made is a small tensor of finite, moderate numbers."""
        dtypes = (self.dtype, *[torch.bfloat16] * self.half)
        if not isinstance(made, torch.Tensor) or made.dtype not in dtypes or not 0 < made.dim() <= 4:
            return False
        if not made.numel():
            return self.empty
        peak = float(made.detach().abs().max())
        return made.numel() <= _LARGEST and peak <= 100  # false where it is NaN

    def fill(self, template: str, x: str) -> str | None:
        shape = self.env[x].shape
        rows, n = shape[0], shape[-1]
        y = self.rng.choice([o for o in self.tensors() if self.env[o].shape == shape])
        b = self.vector("b", n) if "{b}" in template else ""
        s = self.vector("s", n) if "{s}" in template else ""
        return template.format(x=x, y=y, b=b, s=s, n=n, k=max(1, rows - 1), rows=rows)
