"""The backend as torch.compile sees it: options, modes, refusals, reuse of graphs, isolation."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F

from oasis_fx import LowRankGrad, OasisAdamW, OasisWarning, oasis_backend
from oasis_fx.runtime.layout import as_rows

EAGER = {"inner": "aot_eager"}


def net(n: int = 12, m: int = 20, out: int = 7) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(n, m), torch.nn.Tanh(), torch.nn.Linear(m, out)).double()


def batch(seed: int = 0, n: int = 12) -> torch.Tensor:
    return torch.randn(9, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_exact(model: torch.nn.Module, reference: torch.nn.Module, rewritten: set[str] | None) -> None:
    """Each gradient is dW @ Q where rewritten and dW elsewhere."""
    found = set()
    for (name, weight), (_, dense) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if isinstance(weight.grad, LowRankGrad):
            found.add(name.removesuffix(".weight"))
            expected = as_rows(dense.grad, weight.grad.features) @ weight.grad.basis.detach()
            torch.testing.assert_close(weight.grad.factor, expected, rtol=1e-10, atol=1e-10, msg=name)
        elif dense.grad is None:
            assert weight.grad is None, name
        else:
            torch.testing.assert_close(weight.grad, dense.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert rewritten is None or found == rewritten


def backward(function, *inputs) -> None:
    function(*inputs).square().sum().backward()


# Options and modes


@pytest.mark.parametrize(
    "keywords",
    [{"options": {"max_autotune": True}}, {"mode": "max-autotune-no-cudagraphs"}, {"mode": "default"}, {}],
    ids=str,
)
def test_mode_and_options_reach_inductor(keywords, monkeypatch) -> None:
    seen = {}
    import oasis_fx.lowering as lowering

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
    import oasis_fx.lowering as lowering

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


# Globs


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


# What the analysis cannot see through


def test_unsupported_graphs_keep_right_dense_gradients() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.plain, self.computed, self.mutated = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
            self.custom = torch.nn.Linear(6, 6, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            x = self.plain(x)
            x = x + F.linear(x, self.computed.weight.tanh())
            h = self.mutated(x)
            h.mul_(2.0)
            return torch.ops.oasis_fx_test.times(h, self.custom.weight)

    model, x = Odd(), torch.randn(4, 6, dtype=torch.float64)
    reference = copy.deepcopy(model)
    backward(reference, x)
    backend = oasis_backend(rank=2, **EAGER)
    backward(torch.compile(model, backend=backend, fullgraph=True), x)
    assert_exact(model, reference, {"plain", "mutated"})
    assert model.calls == 1
    (record,) = backend.compiled_graphs()
    reasons = {record.names[index]: why for index, why in record.reasons.items()}
    why = "no matmul of this graph reads it directly, only"
    assert reasons == {"computed.weight": f"{why} tanh", "custom.weight": f"{why} times"}


@torch.library.custom_op("oasis_fx_test::times", mutates_args=())
def times(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.T


@times.register_fake
def _(x, w):
    return x.new_empty(x.shape[0], w.shape[0])


times.register_autograd(
    lambda ctx, dy: (dy @ ctx.saved_tensors[1], dy.T @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_a_failing_pass_leaves_dense_gradients_and_warns(monkeypatch) -> None:
    from oasis_fx.graph import PassError

    def fail(*_):
        raise PassError("project_activations", None, "on purpose")

    monkeypatch.setattr("oasis_fx.pipeline.project_activations", fail)
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    with pytest.warns(OasisWarning, match="gradients of this graph stay dense.*on purpose"):
        backward(torch.compile(model, backend=oasis_backend(rank=3, **EAGER)), x)
    assert_exact(model, reference, set())


def test_a_surprise_in_torch_leaves_dense_gradients_and_warns(monkeypatch) -> None:
    def gone(*_):
        raise AttributeError("'GraphModule' object has no attribute 'private'")

    monkeypatch.setattr("oasis_fx.passes.lift_runtime_inputs.copy_dynamo_attributes", gone)
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    with pytest.warns(OasisWarning, match="torch surprised oasis_fx.*has no attribute 'private'"):
        backward(torch.compile(model, backend=oasis_backend(rank=3, **EAGER)), x)
    assert_exact(model, reference, set())


def test_a_torch_without_the_private_names_is_plain_inductor(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "oasis_fx.lowering", None)
    monkeypatch.delattr("oasis_fx.lowering", raising=False)
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    with pytest.warns(OasisWarning, match="does not know this torch"):
        backward(torch.compile(model, backend=oasis_backend(rank=3, **EAGER)), x)
    assert_exact(model, reference, set())


# Bases belong to the parameters of each call, not to what was seen at compile time


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_equal_layers(inner) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x):
            return torch.tanh(self.fc(x))

    torch.manual_seed(0)
    layers = torch.nn.ModuleList(Layer() for _ in range(3))
    reference, x = copy.deepcopy(layers), torch.randn(5, 8, dtype=torch.float64)
    compiles = []
    backend = oasis_backend(rank=3, inner=inner)

    def counting(gm, inputs, **kwargs):
        compiles.append(gm)
        return backend(gm, inputs, **kwargs)

    for layer in layers:
        layer.compile(backend=counting)
    h, expected = x, x
    for layer, plain in zip(layers, reference, strict=True):
        h, expected = layer(h), plain(expected)
    h.square().sum().backward(), expected.square().sum().backward()
    assert_exact(layers, reference, {"0.fc", "1.fc", "2.fc"})
    assert len(compiles) == 2  # the first layer's input needs no gradient, the others' do: one graph for both
    assert len({id(layer.fc.weight.grad.basis) for layer in layers}) == 3


def test_a_second_model_with_the_same_code_has_its_own_bases() -> None:
    first, second = net(), net()
    with torch.no_grad():
        second[0].weight.mul_(-2)
    backend = oasis_backend(rank=3, **EAGER)
    for model in (first, second):
        reference = copy.deepcopy(model)
        backward(reference, batch())
        backward(torch.compile(model, backend=backend), batch())
        assert_exact(model, reference, {"0", "2"})
    assert first[0].weight.grad.subspace is not second[0].weight.grad.subspace


def test_two_backends_on_one_model_keep_apart() -> None:
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    for rank in (3, 5, 3):
        model.zero_grad()
        backward(torch.compile(model, backend=oasis_backend(rank=rank, **EAGER)), x)
        assert model[0].weight.grad.factor.shape == (20, rank)
        assert_exact(model, reference, {"0", "2"})


def test_a_weight_used_in_two_graphs_adds_both_parts_up() -> None:
    layer = torch.nn.Linear(6, 6, dtype=torch.float64)

    def twice(x):
        h = torch.tanh(layer(x))
        torch._dynamo.graph_break()
        return layer(h)

    reference = copy.deepcopy(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    reference(torch.tanh(reference(x))).square().sum().backward()
    torch.compile(twice, backend=oasis_backend(rank=3, **EAGER))(x).square().sum().backward()
    assert_exact(layer, reference, {"weight"})


def test_threads_do_not_share_state() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            model, x = net(), batch(seed)
            reference = copy.deepcopy(model)
            compiled = torch.compile(model, backend=oasis_backend(rank=2 + seed, **EAGER))
            optimizer = OasisAdamW(model.parameters(), lr=1e-3)
            for _ in range(3):
                optimizer.zero_grad()
                reference.load_state_dict(model.state_dict())
                reference.zero_grad()
                backward(compiled, x), backward(reference, x)
                assert_exact(model, reference, {"0", "2"})
                optimizer.step()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_deleted_model_frees_its_bases_and_parameters() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend)
    backward(compiled, batch())
    gone = [weakref.ref(model[0].weight), weakref.ref(model[0].weight.grad.basis)]
    model.zero_grad()
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    del backend


@pytest.mark.parametrize("dynamic", [None, True])
def test_batch_sizes_may_change(dynamic) -> None:
    model = net()
    reference = copy.deepcopy(model)
    backend = oasis_backend(rank=3, **EAGER)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    for size in (9, 5, 7, 11):
        x = torch.randn(size, 12, dtype=torch.float64)
        model.zero_grad(), reference.zero_grad()
        backward(compiled, x), backward(reference, x)
        assert_exact(model, reference, {"0", "2"})
    assert len(backend.compiled_graphs()) == (1 if dynamic else 2)
    for record in backend.compiled_graphs():
        assert len(record.retrace().sites) == 2


def test_parameters_not_reached_have_no_gradient() -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = (torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(2))

        def forward(self, x):
            return self.used(x), self.unused(x)

    model, x = Branches(), torch.randn(4, 6, dtype=torch.float64)
    out, _ = torch.compile(model, backend=oasis_backend(rank=2, **EAGER))(x)
    out.square().sum().backward()
    assert isinstance(model.used.weight.grad, LowRankGrad)
    # A compiled graph gives a zero gradient to what its other output reads; stock torch.compile does too.
    stock = copy.deepcopy(model)
    stock.zero_grad()
    torch.compile(stock, backend="aot_eager")(x)[0].square().sum().backward()
    if stock.unused.weight.grad is None:
        assert model.unused.weight.grad is None
    else:
        assert model.unused.weight.grad.norm() == 0 == stock.unused.weight.grad.norm()


def test_compiled_autograd_delivers_low_rank_gradients() -> None:
    model, x = net(), batch()
    reference = copy.deepcopy(model)
    backward(reference, x)
    with torch._dynamo.config.patch(compiled_autograd=True):
        backward(torch.compile(model, backend=oasis_backend(rank=3, **EAGER)), x)
    dense = model[0].weight.grad
    basis_gradient = dense.to_dense() if isinstance(dense, LowRankGrad) else dense
    assert torch.linalg.matrix_rank(basis_gradient) == 3


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_nested_compile_region_is_right_rewritten_or_not(inner) -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8, dtype=torch.float64) for _ in range(2))
    head = torch.nn.Linear(8, 4, dtype=torch.float64)

    @torch.compiler.nested_compile_region
    def region(x, weight, bias):
        return torch.tanh(F.linear(x, weight, bias))

    def function(x):
        for layer in layers:
            x = region(x, layer.weight, layer.bias)
        return head(x)

    model = torch.nn.ModuleList([*layers, head])
    reference, x = copy.deepcopy(model), torch.randn(5, 8, dtype=torch.float64)
    reference[2](torch.tanh(reference[1](torch.tanh(reference[0](x))))).square().sum().backward()
    backward(torch.compile(function, backend=oasis_backend(rank=2, inner=inner)), x)
    assert_exact(model, reference, None)  # torch may inline the region or partition it by itself
    assert isinstance(head.weight.grad, LowRankGrad)


def test_a_graph_whose_outputs_need_no_gradients_is_reported_as_that() -> None:
    model = net()
    backend = oasis_backend(rank=3, **EAGER)
    found = torch.compile(lambda x: model(x).argmax(-1), backend=backend)(batch())
    assert torch.equal(found, model(batch()).argmax(-1))
    (report,) = backend.report()
    assert {row.reason for row in report.skipped} == {"nothing that the graph returns needs gradients"}
    assert backend.graphs() == []
