"""The fuzzer itself: it sees what is wrong, and makes it small."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from fuzz.calling import CALLS, alone
from fuzz.generate import generate
from fuzz.oracle import draw, judge
from fuzz.program import Options, Parameter, Program, Read, Statement
from fuzz.shrink import shrink
from oasis_fx.compile import joint
from oasis_fx.passes import low_rank_gradients, project_activations

ROWS = "{}.reshape(-1, 4)"


def linear(makes: str, x: str, weight: str) -> Statement:
    return Statement(f"{makes} = F.linear({x}, self.{weight})", makes, (Read(weight, ROWS.format(x), (1,)),))


TWICE = Program(
    0,
    (Parameter("w1", "torch.nn.Parameter(randn(4, 4))"), Parameter("w2", "torch.nn.Parameter(randn(4, 4))")),
    (Parameter("x1", "randn(3, 4).requires_grad_()"),),
    (
        linear("v1", "x1", "w1"),
        Statement("v2 = torch.tanh(v1)", "v2"),
        linear("v3", "v2", "w1"),
        Statement("v4 = v3.sin()", "v4"),
        linear("v5", "v4", "w2"),
    ),
    ("v5", "v2"),
    (0, 1),
    Options(rank=2),
)


def test_a_right_program_is_right_and_all_of_it_is_compared() -> None:
    verdict = judge(TWICE)
    assert verdict.kind == "right", verdict
    assert verdict.counts["low-rank gradient"] == 2 and verdict.counts["statistic"] == 2
    assert verdict.counts["input gradient"] == 3 and verdict.counts["output"] == 2


def test_a_lost_use_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(low_rank_gradients, "_sum", lambda graph, parts: parts[0])
    assert judge(TWICE).what == "wrong: low-rank gradient"


def test_a_statistic_at_half_its_size_is_seen(monkeypatch) -> None:
    scaled = lambda graph, p: project_activations.insert_after(graph, p, torch.ops.aten.mul.Tensor, p, 0.5)  # noqa: E731
    monkeypatch.setattr(project_activations, "_scaled", scaled)
    assert judge(TWICE).what == "wrong: statistic"


def test_a_statistic_of_one_use_of_two_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(project_activations, "_add_to_gradient", project_activations.set_output)
    assert judge(TWICE).what == "wrong: statistic"


def test_a_wrong_dense_gradient_is_seen(monkeypatch) -> None:
    rewrite = joint.rewrite_joint

    def without_bias(gm, facts):
        found = rewrite(gm, facts)
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.cos.default):
            node.target = torch.ops.aten.sin.default
        return found

    monkeypatch.setattr(joint, "rewrite_joint", without_bias)
    assert judge(TWICE).what in ("wrong: input gradient", "wrong: low-rank gradient")


def test_a_crash_of_ours_is_no_crash_of_stock(monkeypatch) -> None:
    def fail(*_, **__):
        raise ZeroDivisionError("of ours")

    with monkeypatch.context() as patch:
        patch.setattr("oasis_fx.compile.lowering.call_with_runtime_inputs", fail)
        verdict = judge(TWICE)
    assert verdict.kind == "crash" and "of ours" in verdict.detail
    everywhere = Statement("torch.compiler.is_compiling() and 1 / 0")
    verdict = judge(replace(TWICE, body=(everywhere, *TWICE.body)))
    assert verdict.kind in ("stock crashes", "right"), verdict


def test_a_program_that_eager_mode_refuses_is_not_judged() -> None:
    assert judge(replace(TWICE, returns=("v9",), in_loss=(0,))).kind == "not drawn"


def test_shrinking_leaves_what_fails() -> None:
    def fails(program: Program) -> bool:
        return any("tanh" in s.text for s in program.statements()) and program.options.rank == 2

    small = shrink(replace(TWICE, options=Options(rank=2, rule="pca", budget=0.5, calls="together")), fails)
    assert [s.text for s in small.body] == ["v2 = torch.tanh(v1)"] or len(small.body) == 1
    assert small.options == Options(rank=2) and len(small.returns) == 1


def test_the_printed_program_runs_alone() -> None:
    for calls in ("stepped", "autograd.grad"):
        exec(compile(alone(replace(TWICE, options=Options(rank=2, calls=calls))), "<alone>", "exec"), {})


def test_a_seed_is_one_program_and_seeds_cover_much() -> None:
    assert draw(7) == draw(7)
    words = set().union(*(generate(seed).features() for seed in range(400)))
    wanted = {
        "experts",
        "conv1d",
        "conv2d",
        "conv3d",
        "groups",
        "nn.MultiheadAttention",
        "nn.Linear",
        "embedding",
        "checkpoint",
    }
    wanted |= {
        "autocast",
        "no_grad",
        "graph break",
        "in place on an input",
        "in place on a buffer",
        "several uses",
        "budget",
    }
    wanted |= {"both ways round", "transpose by keyword", "inner no code", "cat of weights"}
    wanted |= {"tied weights", "varying rows", "loop"}
    wanted |= {f"calls {name}" for name in CALLS}
    assert not wanted - words
