"""Contractions are found by what they compute; everything else is left with a reason."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
import torch.nn.functional as F

from oasis_fx.passes.find_weight_gradients import find_weight_gradients

X = torch.randn(3, 4, 6, dtype=torch.float64)


def test_every_way_to_write_a_matmul_is_found(capture_joint, product) -> None:
    ways = [
        (lambda x, w: F.linear(x, w), (5, 6)),
        (lambda x, w: x @ w, (6, 5)),
        (lambda x, w: w @ x.view(-1, 6).t(), (5, 6)),
        (lambda x, w: torch.addmm(torch.ones(5, dtype=x.dtype), x.view(-1, 6), w), (6, 5)),
        (lambda x, w: torch.einsum("bsn,mn->bsm", x, w), (5, 6)),
        (lambda x, w: torch.einsum("nm,bsn->bsm", w, x), (6, 5)),
        (lambda x, w: F.linear(x, w) + F.linear(torch.tanh(x), w), (5, 6)),
        (lambda x, w: F.linear(x[:1, :1], w), (5, 6)),
        (lambda x, w: F.linear(x, w), (1, 6)),
        (lambda x, w: x @ w, (6, 1)),
    ]
    for number, (function, shape) in enumerate(ways):
        joint = capture_joint(product(function, *shape), X)
        facts = find_weight_gradients(joint.gm, joint.facts)
        sites, skipped = facts.sites, facts.skipped
        assert not skipped, (number, skipped)
        assert len(sites) == 1, number
        assert len(sites[0].terms) == (2 if number == 6 else 1)


def test_operands_of_a_contraction_multiply_to_the_gradient(capture_joint, product) -> None:
    for function, shape in [(lambda x, w: F.linear(x, w), (5, 6)), (lambda x, w: x @ w, (6, 5))]:
        joint = capture_joint(product(function, *shape), X)
        (site,) = find_weight_gradients(joint.gm, joint.facts).sites
        (term,) = site.terms
        joint.graph.output_node().args = ((term.dy, term.x, joint.graph.output_node().args[0][site.position]),)
        joint.gm.recompile()
        dy, x, dense = joint.run(*joint.random_inputs())
        dy = dy.T if term.dy_transposed else dy
        x = x.T if term.x_transposed else x
        product_of_both = dy.T @ x  # [m, n]
        torch.testing.assert_close(product_of_both.T if site.inputs.features == (0, 1) else product_of_both, dense)


def test_a_weight_lifted_with_its_dimensions_the_wrong_way_round_is_left_alone(capture_joint, product) -> None:
    """A square weight, so that no shape tells: G would be of the right shape and of wrong values."""
    for function, right in [(lambda x, w: F.linear(x, w), (1, 2)), (lambda x, w: x @ w, (0, 1))]:
        joint = capture_joint(product(function, 6, 6), X)
        (lifted,) = joint.lifted
        assert lifted.features == right
        wrong = replace(lifted, features=(0, 1) if right == (1, 2) else (1, 2))
        facts = find_weight_gradients(joint.gm, replace(joint.facts, lifted=(wrong,)))
        (skipped,) = facts.skipped
        assert not facts.sites and "pairs its activation with its out dimension" in skipped.reason


def test_reasons_for_what_is_no_contraction(capture_joint, product) -> None:
    class Quadratic(torch.autograd.Function):
        """Its weight gradient multiplies two incoming gradients."""

        @staticmethod
        def forward(x, w):
            return F.linear(x, w)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, dy):
            _, w = ctx.saved_tensors
            return dy @ w, dy.flatten(0, 1).t() @ (dy @ w).flatten(0, 1)

    cases = [
        (lambda x, w: F.linear(x, w) + w.sum(), "a part is not a matrix|not a matmul"),
        (lambda x, w: F.linear(x, w) * w.sin().sum(), "computed by aten.* not a matmul"),
        (lambda x, w: Quadratic.apply(x, w) + 0 * F.linear(x, w).detach(), "both operands depend"),
        (lambda x, w: F.linear(x, w).detach() * x.sum(), "no gradient reaches it"),
    ]
    for function, reason in cases:
        joint = capture_joint(product(function, 5, 6), X.clone().requires_grad_())
        facts = find_weight_gradients(joint.gm, joint.facts)
        sites, skipped = facts.sites, facts.skipped
        assert not sites
        (miss,) = skipped
        assert re.search(reason, miss.reason), (miss.reason, reason)
