"""What is too large for a budget does not keep out what would fit, however dear it is."""

from __future__ import annotations

import torch

from oasis_fx.compile.pipeline import rewrite_joint
from oasis_fx.graph.edits import value
from oasis_fx.memory.node_costs import num_bytes
from oasis_fx.passes.plan_saves import cheapest_plan

TOKENS, WIDTH, VOCABULARY = 64, 256, 4000


class Net(torch.nn.Module):
    """Logits of a MiB, each of whose bytes is dear to recompute, and six sines of 64 KiB that are cheap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = torch.nn.Linear(16, WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x):
        h = self.first(x)
        for _ in range(6):
            h = torch.sin(h)
        return torch.logsumexp(self.head(h), -1).sum()


def test_cheap_values_are_kept_beside_a_dear_one_that_is_too_large(capture_joint) -> None:
    """At one rate between bytes and price the logits come first, so that nothing is between them and nothing at all."""
    joint = capture_joint(Net(), torch.randn(TOKENS, 16), exclude="no.such.*", rank=4)
    rewrite_joint(joint.gm, joint.facts)
    logits, sine = 4 * TOKENS * VOCABULARY, 4 * TOKENS * WIDTH
    budget = logits // 2
    plan = cheapest_plan(joint.gm.graph, joint.num_forward_outputs, budget)
    assert max(num_bytes(value(node)) for node in plan.kept) < logits
    assert 6 * sine <= plan.num_bytes <= budget
    assert plan.price == 2 * TOKENS * WIDTH * VOCABULARY / 16  # the logits, and nothing else
