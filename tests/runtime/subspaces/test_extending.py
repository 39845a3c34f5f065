"""The rule of docs/extending.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.rules import RULES, Oja, Rule, StatisticRule, register, rule_of

PAGE = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def tokens():
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 30
    namespace: dict = {"__name__": "extending"}
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), namespace)
    yield namespace["Tokens"]
    RULES.pop("tokens")


def test_the_example_of_the_page_trains(tokens) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4)).double()
    backend = oasis_backend(rank=3, subspace=rule_of("tokens", every=2), inner="aot_eager")
    compiled, optimizer = torch.compile(model, backend=backend), OasisAdamW(model.parameters(), lr=1e-2)
    x, y = torch.randn(40, 8).double(), torch.randn(40, 4).double()
    losses = []
    for _ in range(20):
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        q = model[0].weight.grad.basis.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    torch.testing.assert_close(q.T @ q, torch.eye(3).double())
    # Each column is a combination of tokens.
    assert float((q - x.T @ torch.linalg.lstsq(x.T, q).solution).abs().max()) < 1e-9
    assert [row.num_updates for row in backend.stats()] == [10, 10]


def test_what_is_no_rule_is_refused(tokens) -> None:
    class Lost(Rule):
        name = "lost"

    with pytest.raises(ValueError, match="must derive from StatisticRule, BatchRule or DrawnRule"):
        register(Lost())

    class Other(StatisticRule):
        name = "oja"

    with pytest.raises(ValueError, match="a rule named 'oja' exists"):
        register(Other())
    register(Oja())  # again: nothing happens
    with pytest.raises(ValueError, match=r"subspace is 'pace': it must be one of 'oja', .*'tokens', or a rule"):
        oasis_backend(subspace="pace")
