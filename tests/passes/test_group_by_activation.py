"""Which weights read a matmul, in which orientation, and which of them share an activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

X = torch.randn(3, 4, 6, dtype=torch.float64)


class Attention(torch.nn.Module):
    """q, k and v read one activation, k through a reshape; out reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(6, 6, bias=False, dtype=torch.float64) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1, 6)
        mixed = self.q(x) * self.k(flat).view(3, 4, 6) + x @ self.v.weight.T
        return self.out(mixed)


def group_names(joint) -> list[set[str]]:
    names = joint.record.names
    return [{names[weight].removesuffix(".weight") for weight in group.weights} for group in joint.record.groups]


def test_weights_that_read_one_activation_share_a_group(capture_joint) -> None:
    assert group_names(capture_joint(Attention(), X)) == [{"q", "k", "v"}, {"out"}]


def test_a_weight_used_twice_joins_both_activations(capture_joint) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

        def forward(self, x):
            return self.c(self.a(torch.tanh(self.a(x)))) + self.b(x)

    # a reads x and tanh(a(x)); b reads x too: one basis for both. c reads its own.
    assert group_names(capture_joint(Twice(), X)) == [{"a", "b"}, {"c"}]


def test_orientation_of_each_way_to_write_a_matmul(capture_joint, product) -> None:
    ways = {
        "linear": (lambda x, w: F.linear(x, w), (5, 6), False),
        "linear keywords": (lambda x, w: F.linear(input=x, weight=w), (5, 6), False),
        "x @ w": (lambda x, w: x @ w, (6, 5), True),
        "x @ w.T": (lambda x, w: x @ w.T, (5, 6), False),
        "matmul(x, w.t())": (lambda x, w: torch.matmul(x, w.t()), (5, 6), False),
        "x.matmul(w)": (lambda x, w: x.matmul(w), (6, 5), True),
        "addmm": (lambda x, w: torch.addmm(torch.zeros(5, dtype=x.dtype), x.view(-1, 6), w), (6, 5), True),
        "mm of a transposed weight": (lambda x, w: torch.mm(x.view(-1, 6), w.transpose(0, 1)), (5, 6), False),
        "w @ x": (lambda x, w: w @ x.view(-1, 6).t(), (5, 6), False),
        "einsum mn": (lambda x, w: torch.einsum("bsn,mn->bsm", x, w), (5, 6), False),
        "einsum nm": (lambda x, w: torch.einsum("nm,bsn->bsm", w, x), (6, 5), True),
    }
    for way, (function, shape, transposed) in ways.items():
        joint = capture_joint(product(function, *shape), X)
        (group,) = joint.record.groups
        assert group.features == ((0, 1) if transposed else (1, 2),), way


def test_weights_inside_a_checkpointed_region_are_seen(capture_joint) -> None:
    class Checkpointed(Attention):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert group_names(capture_joint(Checkpointed(), X)) == [{"q", "k", "v"}, {"out"}]


def test_reasons(capture_joint) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("computed", "both", "frozen", "lookup"):
                setattr(self, name, torch.nn.Parameter(torch.randn(6, 6, dtype=torch.float64)))
            self.cube = torch.nn.Parameter(torch.randn(4, 6, 6, dtype=torch.float64))
            self.frozen.requires_grad_(False)
            self.lm_head = torch.nn.Linear(6, 9, dtype=torch.float64)

        def forward(self, x):
            h = F.linear(x, self.computed * 2) + x @ self.both + F.linear(x, self.both) + F.linear(x, self.frozen)
            h = h + F.embedding(torch.zeros(3, 4, dtype=torch.long), self.lookup) + F.linear(x, self.lookup)
            return self.lm_head(torch.bmm(h.transpose(0, 1), self.cube.exp()))

    joint = capture_joint(Odd(), X)
    assert joint.record.groups == ()
    assert joint.skipped_by_name() == {
        "computed": "no matmul of this graph reads it directly, only mul",
        "both": "matmuls sum over different dimensions of it",
        "frozen": "frozen",
        "lookup": "embedding, or tied to one, excluded by default",
        "cube": "no matmul of this graph reads it directly, only exp",
        "lm_head.weight": "output head, excluded by default",
    }
