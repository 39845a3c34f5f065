"""Mistakes that people make with the backend, and what they are told."""

from __future__ import annotations

import warnings

import pytest
import torch

from oasis_fx import OasisAdamW, OasisMuon, oasis_backend
from oasis_fx.backend import default_backend
from oasis_fx.errors import OasisWarning


def compiled(**arguments):
    torch._dynamo.reset()
    return torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4)), **arguments)


def test_a_backend_that_was_not_made() -> None:
    with pytest.raises(ValueError, match=r"backend is oasis_backend itself.*oasis_backend\(rank=32\)"):
        compiled(backend=oasis_backend)(torch.randn(2, 4))
    with pytest.raises(ValueError, match="got \\('pca',\\) after the rank"):
        oasis_backend(8, "pca")


def test_settings_among_the_options_of_inductor() -> None:
    with pytest.raises(Exception, match=r"options names 'rank'.*backend=oasis_backend\(rank=\.\.\.\)"):
        compiled(backend="oasis", options={"rank": 16})(torch.randn(2, 4))
    with pytest.raises(ValueError, match="options names 'rank', 'tail'"):
        oasis_backend(options={"rank": 16, "tail": 2})


def test_the_backend_by_its_name_has_a_report() -> None:
    assert default_backend() is default_backend() and isinstance(default_backend().report(), list)


def test_an_optimizer_shows_its_settings_alone() -> None:
    weights = list(torch.nn.Linear(4, 4).parameters())
    for kind in (OasisAdamW, OasisMuon):
        shown = repr(kind(weights))
        assert "lr: " in shown and "step_count" not in shown and "rank_plans" not in shown


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 4))


def train_step(model, optimizer) -> None:
    model(torch.randn(32, 24)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("rank", "names"), [(32, ["0.weight"]), (64, ["0.weight", "2.weight"]), ({"2*": 50}, ["2.weight"])]
)
def test_a_rank_over_the_width_is_told_once(rank, names) -> None:
    model, backend = small(), oasis_backend(rank=rank, inner="aot_eager")
    torch.compiler.reset()
    with pytest.warns(OasisWarning, match="over the width of .* Give a smaller rank") as told:
        torch.compile(model, backend=backend)(torch.randn(32, 24)).sum().backward()
        torch.compiler.reset()
        torch.compile(model, backend=backend)(torch.randn(32, 24)).sum().backward()
    (message,) = (str(one.message) for one in told)
    assert all(name in message for name in names) and ("2.weight" in message) == ("2.weight" in names)
    assert told[0].filename == __file__  # the line that called the model


def test_a_rank_over_the_width_is_an_error_that_says_so_where_warnings_are_errors() -> None:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", OasisWarning)
        with pytest.raises(OasisWarning, match=r"^rank is 64, over the width of 0\.weight, 2\.weight"):
            torch.compile(small(), backend=oasis_backend(rank=64, inner="aot_eager"))(torch.randn(32, 24))


def test_what_a_rank_over_the_width_costs() -> None:
    """What the warning says: more than a dense gradient takes."""
    backend = oasis_backend(rank=64, inner="aot_eager")
    torch.compiler.reset()
    with pytest.warns(OasisWarning, match="states take more memory than dense ones"):
        torch.compile(small(), backend=backend)(torch.randn(32, 24)).sum().backward()
    totals = backend.report()[0].totals
    assert totals.gradient_bytes_after > totals.gradient_bytes_before
    assert totals.adam_bytes_after > totals.adam_bytes_before


@pytest.mark.parametrize("rank", [10**6, 24, 0.9, {"0*": 24, "2*": 40}])
def test_ranks_that_are_no_mistake(rank) -> None:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", OasisWarning)
        torch.compile(small(), backend=oasis_backend(rank=rank, inner="aot_eager"))(
            torch.randn(32, 24)
        ).sum().backward()


def test_the_report_of_nothing() -> None:
    backend = oasis_backend(rank=8, inner="aot_eager")
    with pytest.raises(IndexError, match=r"nothing was compiled for training.*torch.no_grad\(\)"):
        backend.report()[0]
    assert "nothing was compiled for training" in str(backend.report()) and backend.report() == []
    torch.compiler.reset()
    torch.compile(small(), backend=backend)(torch.randn(32, 24)).sum().backward()
    found = backend.report()
    assert len(found) == 1 and str(found) == str(found[0]) and found[:1] == list(found)
    with pytest.raises(IndexError, match="list index out of range"):
        found[1]


def test_a_forgotten_zero_grad() -> None:
    torch.compiler.reset()
    model = torch.compile(small(), backend=oasis_backend(rank=8, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters())
    train_step(model, optimizer)
    with pytest.raises(RuntimeError, match=r"the basis of the gradient of .* has moved since.*call zero_grad\(\)"):
        train_step(model, optimizer)


def test_an_optimizer_that_is_not_ours(monkeypatch) -> None:
    monkeypatch.setattr("oasis_fx.runtime.gradients.foreign._warned", set())  # other tests step with AdamW as well
    torch.compiler.reset()
    model = torch.compile(small(), backend=oasis_backend(rank=8, inner="aot_eager"))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(OasisWarning, match=r"AdamW is given .*OasisAdamW") as told:
        for _ in range(2):
            train_step(model, optimizer)
            optimizer.zero_grad()
    assert len(told) == 1
