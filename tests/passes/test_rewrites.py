"""The rewritten joint graph computes the same outputs, and low-rank gradients equal to dW @ Q."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oasis_fx._torch.joint_graphs import gradient_positions
from oasis_fx.compile.pipeline import rewrite_joint
from oasis_fx.graph.edits import aten, copy_graph, outputs
from oasis_fx.graph.verifier import PassError, check_graph
from oasis_fx.passes.find_weight_gradients import find_weight_gradients
from oasis_fx.passes.low_rank_gradients import low_rank_gradients
from oasis_fx.passes.project_activations import project_activations

X = torch.randn(3, 4, 6, dtype=torch.float64)


class Block(torch.nn.Module):
    """Shared activations, a weight stored n x m, one used twice, a bias, and a scale that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (torch.nn.Linear(6, 5, dtype=torch.float64) for _ in range(2))
        self.stored_n_m = torch.nn.Parameter(torch.randn(5, 6, dtype=torch.float64))
        self.twice = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))

    def forward(self, x):
        h = (self.q(x) * torch.tanh(self.k(x))) @ self.stored_n_m
        return self.twice(torch.sin(self.twice(h))) * self.scale


@pytest.fixture
def joint(capture_joint):
    return capture_joint(Block(), X)


def rewritten(joint):
    gm = copy_graph(joint.gm)
    facts = rewrite_joint(gm, joint.facts)
    assert len(facts.sites) == 4 and not facts.skipped
    return type(joint)(gm, joint.record, joint.num_forward_outputs)


def test_gradients_are_the_dense_ones_times_the_basis(joint) -> None:
    primals, tangents = joint.random_inputs()
    dense, low_rank = joint.run(primals, tangents), rewritten(joint).run(primals, tangents)
    positions = gradient_positions(joint.graph)
    activations: dict[int, list[torch.Tensor]] = {}
    for weight in joint.lifted:
        d_w, q = dense[positions[weight.weight]], primals[weight.basis]
        if weight.features == (0, 1):
            d_w = d_w.T
        torch.testing.assert_close(low_rank[positions[weight.slot]], d_w @ q, rtol=1e-12, atol=1e-12)
        assert low_rank[positions[weight.weight]] is None
    for site in find_weight_gradients(joint.gm, joint.facts).sites:
        gm = copy_graph(joint.gm)
        nodes = {node.name: node for node in gm.graph.nodes}
        gm.graph.output_node().args = (tuple(nodes[term.x.name] for term in site.terms),)
        xs = type(joint)(gm, joint.record, 0).run(primals, tangents)
        xs = [x.T if term.x_transposed else x for x, term in zip(xs, site.terms, strict=True)]
        activations.setdefault(site.inputs.basis, xs)
    assert len(activations) == 3  # q and k share one
    for basis, xs in activations.items():
        expected = sum(x.T @ (x @ primals[basis]) for x in xs)
        torch.testing.assert_close(low_rank[positions[basis]], expected, rtol=1e-12, atol=1e-12)


def test_everything_else_is_bitwise_the_same(joint) -> None:
    primals, tangents = joint.random_inputs()
    dense, low_rank = joint.run(primals, tangents), rewritten(joint).run(primals, tangents)
    positions = gradient_positions(joint.graph)
    changed = {positions[p] for w in joint.lifted for p in (w.weight, w.slot, w.basis, w.energy)}
    compared = 0
    for index, (one, other) in enumerate(zip(dense, low_rank, strict=True)):
        if index not in changed and one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            compared += 1
    assert compared == 1 + 2 + 1  # the output, two biases, the scale


def test_one_projection_for_each_activation_next_to_it(joint) -> None:
    facts = find_weight_gradients(joint.gm, joint.facts)
    tangent = next(n for n in joint.graph.find_nodes(op="placeholder") if "tangents" in n.name)
    projections = project_activations(joint.gm, facts).projections
    assert len(projections) == 4  # x; q(x) * tanh(k(x)); h; sin(twice(h))
    order = {node: index for index, node in enumerate(joint.graph.nodes)}
    first_backward = min(order[user] for user in tangent.users)
    for (x, *_), projection in projections.items():
        # Where the partitioner sees it as a value of the forward pass, not of the backward pass.
        assert order[x] < order[projection.p] < first_backward


def test_no_dense_weight_gradient_is_left(joint) -> None:
    graph = rewritten(joint).graph
    dense_shapes = {(5, 6), (6, 5), (6, 6)}
    matmuls = [n for n in graph.nodes if n.target is aten.mm.default and tuple(n.meta["val"].shape) in dense_shapes]
    assert matmuls == []


def test_a_graph_without_sites_is_left_alone(capture_joint, product) -> None:
    joint = capture_joint(product(lambda x, w: F.linear(x, w) * w.sin().sum(), 5, 6), X)
    before = str(joint.graph)
    facts = rewrite_joint(joint.gm, joint.facts)
    assert not facts.sites and len(facts.skipped) == 1
    assert str(joint.graph) == before


def test_float16_statistic_does_not_overflow(capture_joint) -> None:
    model = torch.nn.Linear(6, 5, bias=False).half()
    joint = rewritten_half = capture_joint(model, torch.randn(300, 6, dtype=torch.float16))
    assert len(rewrite_joint(joint.gm, joint.facts).sites) == 1
    primals, tangents = joint.random_inputs()
    x_index = next(i for i, p in enumerate(primals) if tuple(p.shape) == (300, 6))
    primals[x_index] = primals[x_index] * 100  # X^T X Q reaches 300 * 1e4 = 3e6, over the largest float16
    result = rewritten_half.run(primals, tangents)[gradient_positions(joint.graph)[joint.lifted[0].basis]]
    q, x = primals[joint.lifted[0].basis].double(), primals[x_index].double()
    torch.testing.assert_close(result.double(), x.T @ (x @ q), rtol=2e-2, atol=2e-2 * 3e6)
    assert result.isfinite().all()


def test_the_verifier_names_a_wrong_node(joint) -> None:
    projections = project_activations(joint.gm, find_weight_gradients(joint.gm, joint.facts)).projections
    check_graph("project_activations", joint.graph)
    p = next(iter(projections.values())).p
    p.meta["val"] = p.meta["val"].new_empty(1, 1)
    with pytest.raises(PassError, match=rf"low_rank.*{p.name}.*claims .*\[1, 1\]"):
        check_graph("low_rank", joint.graph)


def test_the_verifier_sees_a_wrong_order(joint) -> None:
    last = [node for node in joint.graph.nodes if node.op == "call_function"][-1]
    first = next(node for node in joint.graph.nodes if node.op == "call_function")
    first.args = (last, *first.args[1:])
    with pytest.raises(PassError, match="used before"):
        check_graph("any", joint.graph)


def test_a_basis_of_the_wrong_size_is_refused(joint) -> None:
    facts = find_weight_gradients(joint.gm, joint.facts)
    basis = list(joint.graph.find_nodes(op="placeholder"))[facts.sites[0].inputs.basis]
    basis.meta["val"] = basis.meta["val"].new_empty(7, 2)
    with pytest.raises(PassError, match="X has 6 columns, the basis 7 rows"):
        project_activations(joint.gm, facts)


def test_the_gradient_of_the_weight_is_none(joint) -> None:
    facts = low_rank_gradients(joint.gm, project_activations(joint.gm, find_weight_gradients(joint.gm, joint.facts)))
    positions = gradient_positions(joint.graph)
    for site in facts.sites:
        assert outputs(joint.graph)[site.position] is None
        assert outputs(joint.graph)[positions[site.inputs.slot]] is not None
