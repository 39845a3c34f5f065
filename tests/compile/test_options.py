"""What reaches torch.compile and Inductor: options, modes, globs, refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import oasis_backend

from .small import EAGER, assert_exact, backward, batch, net


@pytest.mark.parametrize(
    "keywords",
    [{"options": {"max_autotune": True}}, {"mode": "max-autotune-no-cudagraphs"}, {"mode": "default"}, {}],
    ids=str,
)
def test_mode_and_options_reach_inductor(keywords, monkeypatch) -> None:
    seen = {}
    import oasis_fx.compile.lowering as lowering

    real = lowering.inductor_lowering

    def spy(gm, inputs, config_patches, *rest):
        seen.update(config_patches)
        return real(gm, inputs, config_patches, *rest)

    monkeypatch.setattr(lowering, "inductor_lowering", spy)
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    backend = oasis_backend(rank=3, options={"epilogue_fusion": False})
    backward(torch.compile(model, backend=backend, **keywords), x)
    assert_exact(model, reference, {"0", "2"})
    assert seen["epilogue_fusion"] is False
    assert bool(seen.get("max_autotune")) == (keywords not in ({"mode": "default"}, {}))


def test_memory_budget_is_passed_on() -> None:
    model = torch.nn.Sequential(*(net(12, 12, 12) for _ in range(3)))
    reference, x = copy.deepcopy(model), batch()
    backward(reference, x)
    saved = {}
    for budget in (1.0, 0.0):
        torch._dynamo.reset()
        model.zero_grad()
        backend = oasis_backend(rank=3, memory_budget=budget, **EAGER)
        backward(torch.compile(model, backend=backend), x)
        assert_exact(model, reference, {f"{i}.{j}" for i in range(3) for j in (0, 2)})
        (record,) = backend.compiled_graphs()
        forward = record.trace.forward.graph.output_node().args[0]
        nodes = [n for n in forward if isinstance(n, torch.fx.Node) and n.op != "placeholder"]
        saved[budget] = sum(n.meta["val"].numel() for n in nodes)
    assert saved[0.0] < saved[1.0]


def test_a_user_partitioner_is_refused() -> None:
    compiled = torch.compile(net(), backend=oasis_backend(), options={"custom_partitioner_fn": None})
    with pytest.raises(Exception, match="custom_partitioner_fn"):
        compiled(batch())


def test_by_name() -> None:
    model, x = net(40, 50, 36), batch(n=40)
    reference = copy.deepcopy(model)
    backward(reference, x)
    backward(torch.compile(model, backend="oasis"), x)
    assert_exact(model, reference, {"0", "2"})
    assert model[0].weight.grad.factor.shape == (50, 32)


def test_no_grad_and_eval_graphs_are_the_inner_compilers(monkeypatch) -> None:
    import oasis_fx.compile.lowering as lowering

    monkeypatch.setattr(lowering, "lower", lambda *_: pytest.fail("a graph without gradients was rewritten"))
    model, x = net().eval(), batch()
    compiled = torch.compile(model, backend=oasis_backend(rank=3, **EAGER))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


def test_train_eval_train() -> None:
    model, x = net(), batch()
    compiled = torch.compile(model, backend=oasis_backend(rank=3, **EAGER))
    reference = copy.deepcopy(model)
    for _ in range(2):
        model.zero_grad(), reference.zero_grad()
        backward(compiled, x), backward(reference, x)
        assert_exact(model, reference, {"0", "2"})
        with torch.no_grad():
            compiled(x)


def test_a_glob_that_matches_nothing_is_a_value_error_that_lists_the_weights() -> None:
    for keywords in ({"include": "layers.*"}, {"exclude": ["layers.*"]}, {"rank": {"layers.*": 3}}):
        compiled = torch.compile(net(), backend=oasis_backend(**keywords))
        for _ in range(2):  # each call, not only the first
            with pytest.raises(ValueError, match=r"no weight matches 'layers\.\*'.*0\.weight, 2\.weight"):
                compiled(batch())


def test_globs_choose_weights_and_ranks() -> None:
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    backward(torch.compile(model, backend=oasis_backend(rank={"2.*": 0.25}, **EAGER)), x)
    assert_exact(model, reference, {"2"})
    assert model[2].weight.grad.factor.shape == (7, 5)


def test_a_glob_may_match_in_another_graph_of_a_broken_function() -> None:
    model = net()

    def broken(x):
        hidden = model[1](model[0](x))
        torch._dynamo.graph_break()
        return model[2](hidden)

    reference = copy.deepcopy(model)
    backward(reference, batch())
    backward(torch.compile(broken, backend=oasis_backend(rank=3, include="*2*", **EAGER)), batch())
    assert_exact(model, reference, {"2"})
