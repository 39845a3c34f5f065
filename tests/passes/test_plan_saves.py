"""The plan against all plans there are, and the partition against the plan."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch import fx

from oasis_fx._torch.joint_graphs import is_tangent
from oasis_fx.compile.partition import _split_as_planned
from oasis_fx.compile.pipeline import rewrite_joint
from oasis_fx.graph.edits import copy_graph, dependents, outputs, value
from oasis_fx.graph.verifier import PassError
from oasis_fx.memory.node_costs import num_bytes, saved_storages
from oasis_fx.memory.save_problem import read_problem
from oasis_fx.memory.waists import waists, waists_to_keep
from oasis_fx.passes.plan_saves import _cut, cheapest_plan

N = 64


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48), torch.nn.Linear(48, 16)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def stack(blocks: int, *more: torch.nn.Module) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(Block() for _ in range(blocks)), *more)


def rewritten(capture_joint, model, *inputs):
    joint = capture_joint(model, *inputs or (torch.randn(N, 16),), exclude="no.such.*", rank=4)
    rewrite_joint(joint.gm, joint.facts)
    return joint


def partition(joint):
    def run(gm: fx.GraphModule, num_forward_outputs: int):
        return min_cut_rematerialization_partition(gm, None, num_fwd_outputs=num_forward_outputs)

    return run


@pytest.mark.parametrize("rate", [0.5, 2.0, 8.0, 40.0])
def test_a_cut_is_the_cheapest_choice_of_all(capture_joint, rate) -> None:
    def chain(x, w, v):
        a = x @ w
        b = torch.sin(a)
        c = b @ v
        return torch.exp(c) * b + torch.cos(a).sum()

    inputs = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    joint = capture_joint(_Chain(chain, inputs[1:]), inputs[0])
    problem = read_problem(joint.gm.graph, joint.num_forward_outputs)
    values = list(problem.needs)
    assert 4 <= len(values) <= 16

    def cost(kept: frozenset) -> float:
        again, pending = set(), [node for node in problem.demands if node not in kept]
        while pending:
            node = pending.pop()
            if node not in again:
                again.add(node)
                pending += [source for source in problem.needs[node] if source not in kept]
        return sum(problem.price[n] for n in again) + rate * sum(problem.bytes_held[n] for n in kept)

    every = (frozenset(some) for size in range(len(values) + 1) for some in itertools.combinations(values, size))
    found = _cut(problem, rate)
    assert cost(frozenset(found.kept)) == pytest.approx(min(map(cost, every)), rel=1e-4)


class _Chain(torch.nn.Module):
    def __init__(self, function, weights) -> None:
        super().__init__()
        self.function = function
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, x):
        return self.function(x, *list(self.weights))


def test_the_partition_keeps_what_the_plan_says(capture_joint) -> None:
    joint = rewritten(capture_joint, stack(4))
    tangents = [node for node in joint.gm.graph.find_nodes(op="placeholder") if is_tangent(node)]
    of_forward = {node.name for node in set(joint.gm.graph.nodes) - dependents(tangents)}
    sizes = []
    for budget in (60_000, 40_000, 25_000, 8_000):
        gm = copy_graph(joint.gm)
        plan = cheapest_plan(gm.graph, joint.num_forward_outputs, budget)
        kept, again = {node.name for node in plan.kept}, {node.name for node in plan.recomputed}
        forward, backward = _split_as_planned(gm, partition(joint), joint.num_forward_outputs, plan)
        saved = saved_storages(forward.graph, joint.num_forward_outputs)
        assert saved.keys() == kept and sum(saved.values()) == plan.num_bytes <= budget
        # The only part of the forward pass in the backward graph is what is recomputed.
        names = {node.name for node in backward.graph.nodes if node.op == "call_function"}
        assert names & of_forward == again
        assert len(outputs(forward.graph)) == len(forward.graph.output_node().meta["desc"])
        sizes.append(plan.num_bytes)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_p_is_kept_where_that_frees_x_and_only_there(capture_joint) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.freed, self.alive = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)

        def forward(self, x):
            h = torch.cumsum(x, 0)  # dear to recompute, and no gradient asks for it
            y = self.alive(torch.exp(self.freed(h)))  # the gradient of exp reads its result, which `alive` reads
            return y.sum()

    joint = rewritten(capture_joint, Net(), torch.randn(N, 16, requires_grad=True))
    plan = cheapest_plan(joint.gm.graph, joint.num_forward_outputs, 10**9)
    kept = {str(node.target).partition(".")[2].partition(".")[0]: value(node).shape for node in plan.kept}
    by_operator = [(str(node.target), tuple(value(node).shape)) for node in plan.kept]
    assert "cumsum" not in kept and ("aten.mm.default", (N, 4)) in by_operator  # P of `freed` in place of h
    assert kept["exp"] == (N, 16) and by_operator.count(("aten.mm.default", (N, 4))) == 1  # no P of `alive` beside it


def test_one_large_tensor_does_not_keep_small_ones_out(capture_joint) -> None:
    joint = rewritten(capture_joint, _WithLogits())
    logits = N * 4000 * 4
    for budget in (logits * 0.9, logits * 0.05):
        plan = cheapest_plan(joint.gm.graph, joint.num_forward_outputs, int(budget))
        assert plan.num_bytes <= budget
        assert max(num_bytes(value(node)) for node in plan.kept) < logits
    assert plan.num_bytes > budget * 0.6


def test_what_is_too_large_makes_room_for_what_is_cheaper_a_byte(capture_joint) -> None:
    def branches(x, y, dear, cheap, cheaper):
        large = torch.sin(x @ dear).sum()  # most work a byte, so that a rate which keeps it keeps nothing else before
        return large + torch.sin(y @ cheap).sum() + torch.cos(y @ cheaper).sum()

    shapes = [(256, 256), (4, 8), (4, 8)]
    weights = [torch.randn(shape, requires_grad=True) for shape in shapes]
    net = _Chain(lambda x, *w: branches(x, x[:, :4], *w), weights)
    joint = capture_joint(net, torch.randn(N, 256))
    large, small = N * 256 * 4, N * 8 * 4
    for budget, expected in ((large - 1, 2 * small), (2 * small, 2 * small), (small, small), (large, large)):
        plan = cheapest_plan(joint.gm.graph, joint.num_forward_outputs, budget)
        assert plan.num_bytes == expected, budget


class _WithLogits(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = stack(4), torch.nn.Linear(16, 4000)

    def forward(self, x):
        return torch.logsumexp(self.head(self.body(x)), -1).sum()


def test_waists_are_where_one_tensor_passes(capture_joint) -> None:
    joint = rewritten(capture_joint, stack(4))
    problem = read_problem(joint.gm.graph, joint.num_forward_outputs)
    narrow = waists(problem)
    # Three sums between blocks; the last one goes to no value, and the first block reads an input.
    sums = [node for node in narrow if "add.Tensor" in str(node.target) and value(node).shape == (N, 16)]
    assert len(sums) == 3
    size = N * 16 * 4
    chosen = {budget: waists_to_keep(problem, budget) for budget in (0, size, 3 * size, 10 * size)}
    assert chosen[0] == [] and len(chosen[size]) <= 1
    assert set(chosen[10 * size]) <= set(narrow) and len(chosen[10 * size]) >= 2


def test_what_is_random_is_never_recomputed(capture_joint) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.b(F.dropout(torch.tanh(self.a(x)), 0.5)).square().sum()

    joint = rewritten(capture_joint, Net().train())
    plan = cheapest_plan(joint.gm.graph, joint.num_forward_outputs, 0)
    drop = [node for node in joint.gm.graph.nodes if "dropout" in str(node.target) or "bernoulli" in str(node.target)]
    drop += [node for node in joint.gm.graph.nodes if "rand" in str(node.target)]
    assert drop and not set(drop) & set(plan.recomputed)
    assert 0 < plan.num_bytes  # a budget that cannot be met gets the least there is


def test_attention_is_recomputed_without_random_states(capture_joint) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = torch.nn.Linear(16, 48, bias=False), torch.nn.Linear(16, 16, bias=False)

        def forward(self, x):
            q, k, v = self.qkv(x).view(1, N, 3, 2, 8).permute(2, 0, 3, 1, 4)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(a.transpose(1, 2).reshape(N, 16)).square().sum()

    joint = rewritten(capture_joint, Net())
    plan = cheapest_plan(joint.gm.graph, joint.num_forward_outputs, 0)
    attention = [node for node in plan.recomputed if "attention" in str(node.target)]
    assert len(attention) == 1 and plan.num_bytes == 0
    forward, backward = _split_as_planned(joint.gm, partition(joint), joint.num_forward_outputs, plan)
    targets = [str(node.target) for node in (*forward.graph.nodes, *backward.graph.nodes)]
    assert not any("rng" in target for target in targets)
    assert sum("attention" in target and "backward" not in target for target in targets) == 2


def test_what_can_neither_be_kept_nor_repeated_is_an_error(capture_joint) -> None:
    joint = rewritten(capture_joint, stack(1))
    problem = read_problem(joint.gm.graph, joint.num_forward_outputs)
    node = next(iter(problem.demands))
    problem.price[node] = problem.bytes_held[node] = math.inf  # type: ignore[index]
    with pytest.raises(PassError, match="neither be kept nor recomputed"):
        _cut(problem, 1.0)
