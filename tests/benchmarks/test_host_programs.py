"""Benchmarks that compare versions of a graph: each version is what its name says."""

from __future__ import annotations

import pytest

from benchmarks import wrappers
from oasis_fx import LowRankGrad
from oasis_fx.runtime.subspaces.rules import Oja


@pytest.mark.parametrize("rule", [None, Oja()], ids=["stock", "ours"])
def test_wrappers_are_those_of_seven_weights(rule) -> None:
    contender = wrappers.Contender(2, rule, regional=True)
    for _ in range(2):
        contender.step()
    assert len(contender.forward) == len(contender.backward) == 2
    assert all(time > 0 for time in contender.times())
    contender.net(contender.x).sum().backward()
    gradients = [weight.grad for weight in contender.net.parameters()]
    assert len(gradients) == 14
    assert all(isinstance(gradient, LowRankGrad) == (rule is not None) for gradient in gradients)


@pytest.mark.slow
def test_an_operator_computes_the_statistics_that_could_be_left_out(capsys) -> None:
    pytest.importorskip("transformers")
    from benchmarks import unused_statistics

    asked = ["--model", "64x1", "--batch", "1", "--seq", "16", "--steps", "1", "--rank", "4", "--inner", "aot_eager"]
    unused_statistics.main(asked)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0].strip(): int(row[-1]) for row in rows} == {
        "in the graph": 0,
        "operator, due": 4,
        "operator, not due": 4,
        "none": 0,
    }
