"""One policy for failures: whatever of ours raises, the graph is compiled as it came, with one warning about it."""

from __future__ import annotations

import copy
import warnings
from functools import wraps

import pytest
import torch

from oasis_fx import LowRankGrad, OasisWarning, oasis_backend

from .small import EAGER, assert_exact, backward, batch, net

PLACES = [
    "oasis_fx.compile.groups.parameter_names",
    "oasis_fx._torch.dynamo_graphs.is_partial_graph",
    "oasis_fx.compile.lowering.copy_dynamo_graph",
    "oasis_fx.compile.pipeline.inline_regions",
    "oasis_fx.compile.pipeline.choose_groups",
    "oasis_fx.compile.groups.group_by_activation",
    "oasis_fx.passes.group_by_activation.matmuls",
    "oasis_fx.compile.runtime_inputs.lifted_weights",
    "oasis_fx.compile.runtime_inputs.fake_runtime_inputs",
    "oasis_fx.compile.pipeline.lift_runtime_inputs",
    "oasis_fx.passes.lift_runtime_inputs.mark_static_input",
    "oasis_fx.compile.lowering.known_fake",
    "oasis_fx.compile.lowering.call_with_runtime_inputs",
    "oasis_fx.compile.partitioner.partition_joint",
    "oasis_fx.compile.joint.is_whole_joint",
    "oasis_fx.compile.pipeline.fx_graph_cse",
    "oasis_fx.compile.joint.copy_graph",
    "oasis_fx.compile.pipeline.find_weight_gradients",
    "oasis_fx.compile.pipeline.project_activations",
    "oasis_fx.compile.pipeline.low_rank_gradients",
    "oasis_fx.compile.pipeline.check_graph",
    "oasis_fx.compile.pipeline.keep_changed_inputs",
    "oasis_fx.compile.partition.copies_not_made",
    "oasis_fx.compile.pipeline.early_statistics",
]
OF_GRADIENTS = ["oasis_fx.compile.pipeline.find_dense_gradients", "oasis_fx.compile.pipeline.project_gradients"]
OF_BUDGETS = [
    "oasis_fx.compile.pipeline.allow_bytes",
    "oasis_fx.compile.pipeline.plan_saves",
    "oasis_fx.compile.partition._split_as_planned",
    "oasis_fx.memory.save_problem.ancestors",
]
CASES = [
    *((place, {}) for place in PLACES),
    *((place, {"subspace": "gradient_svd"}) for place in OF_GRADIENTS),
    *((place, {"memory_budget": 0.3}) for place in OF_BUDGETS),
]


class OnPurpose(Exception):
    """No class that a handler could name."""


@pytest.fixture
def break_at(monkeypatch):
    def break_at(place: str) -> None:
        def fail(*_, **__):
            raise OnPurpose(f"{place} is broken")

        monkeypatch.setattr(place, fail)

    return break_at


@pytest.fixture
def surviving(monkeypatch):
    monkeypatch.delenv("OASIS_FX_RAISE")


def trained(given) -> tuple[torch.nn.Module, torch.nn.Module, list[str]]:
    model, x, settings = net(), batch(), {"rank": 3} | EAGER | given
    reference = copy.deepcopy(model)
    backward(reference, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backward(torch.compile(model, backend=oasis_backend(**settings), fullgraph=True), x)
    return model, reference, [str(found.message) for found in caught if issubclass(found.category, OasisWarning)]


@pytest.mark.parametrize(("place", "settings"), CASES, ids=[place for place, _ in CASES])
def test_any_failure_compiles_the_graph_as_it_came_with_one_warning(place, settings, break_at, surviving) -> None:
    break_at(place)
    model, reference, said = trained(settings)
    assert_exact(model, reference, set())
    (text,) = said
    assert text.startswith("gradients of a graph stay dense: OnPurpose: ")
    # The exception, its text, and the innermost line of ours (the broken function is one of this test's).
    assert f"{place} is broken (" in text and ".py:" in text and ", in " in text


@pytest.mark.parametrize(("place", "settings"), CASES, ids=[place for place, _ in CASES])
def test_the_switch_raises_them_all(place, settings, break_at) -> None:
    break_at(place)
    with pytest.raises(Exception, match="is broken") as caught:
        trained(settings)
    error = caught.value
    assert isinstance(getattr(error, "inner_exception", error), OnPurpose)
    assert not torch._inductor.config.force_disable_caches  # of this compile alone


def test_nothing_is_said_where_nothing_fails(surviving) -> None:
    model, reference, said = trained({})
    assert_exact(model, reference, {"0", "2"})
    assert said == []


def test_a_wrong_value_of_a_pass_is_caught(monkeypatch, surviving) -> None:
    """A pass that adds a node with a wrong fake value: the verifier sees it, and nothing is rewritten."""
    from oasis_fx.passes.project_activations import project_activations

    @wraps(project_activations)
    def careless(gm, facts):
        facts = project_activations(gm, facts)
        node = next(iter(facts.projections.values())).p
        node.meta["val"] = node.meta["val"].new_empty(1, 1)
        return facts

    monkeypatch.setattr("oasis_fx.compile.pipeline.project_activations", careless)
    model, reference, said = trained({})
    assert_exact(model, reference, set())
    (text,) = said
    assert "PassError: project_activations at" in text and "claims" in text


@pytest.mark.slow
def test_a_failure_is_left_out_of_the_caches(tmp_path, monkeypatch, break_at, surviving) -> None:
    """Else another process would find dense gradients in the cache, and no warning."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = net().float(), batch().float()
    with monkeypatch.context() as broken:
        broken.setattr("oasis_fx.compile.pipeline.project_activations", lambda *_: 1 / 0)
        with pytest.warns(OasisWarning, match="ZeroDivisionError"):
            backward(torch.compile(model, backend=oasis_backend(rank=3)), x)
    assert not isinstance(model[0].weight.grad, LowRankGrad)
    assert not torch._inductor.config.force_disable_caches
    torch.compiler.reset()
    model.zero_grad()
    backward(torch.compile(model, backend=oasis_backend(rank=3)), x)
    assert isinstance(model[0].weight.grad, LowRankGrad)


@pytest.mark.parametrize("setting", [{"include": "nothing.*"}, {"rank": {"nothing": 4}}])
def test_errors_on_purpose_reach_the_user(setting, surviving) -> None:
    with pytest.raises(ValueError, match="no weight matches 'nothing"):
        trained(setting)


def test_what_stock_refuses_is_raised_as_stock_raises_it(monkeypatch, surviving) -> None:
    """A failure of torch's own on the graph as it came is no failure of ours: no warning speaks of one."""

    def fail(gm, *_):
        raise OnPurpose(f"{len(gm.graph.find_nodes(op='placeholder'))} inputs")

    monkeypatch.setattr("oasis_fx.compile.lowering.aot_eager_lowering", fail)
    with warnings.catch_warnings(), pytest.raises(Exception, match="5 inputs"):
        warnings.simplefilter("error", OasisWarning)
        backward(torch.compile(net(), backend=oasis_backend(rank=3, **EAGER)), batch())
