"""Ways to call `torch.compile`, and what is compiled."""

from __future__ import annotations

import copy

import pytest
import torch

from oasis_fx import LowRankGrad, OasisAdamW, oasis_backend


@pytest.mark.parametrize(
    "how", [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"fullgraph": True}], ids=lambda how: str(how)
)
def test_options_of_compile(kit, how) -> None:
    model = kit.Net()
    reference = copy.deepcopy(model)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    compiled = torch.compile(model, backend=oasis_backend(rank=3), **how)
    for step in range(2):
        reference.load_state_dict(model.state_dict())
        model.zero_grad(), reference.zero_grad()
        kit.backward(compiled, kit.batch(step)), kit.backward(reference, kit.batch(step))
        assert kit.count_low_rank(model, reference) == 4
        optimizer.step()


def test_autocast(kit) -> None:
    model = kit.Net().float()
    reference = copy.deepcopy(model)
    x = kit.batch().float()
    for run, net in ((kit.compile_eager(model).run, model), (torch.compile(reference, backend="aot_eager"), reference)):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(x)
        out.float().square().sum().backward()
        assert all(weight.grad.dtype == torch.float32 for weight in net.parameters())
    assert sum(isinstance(weight.grad, LowRankGrad) for weight in model.parameters()) == 4
    for weight, dense in zip(model.parameters(), reference.parameters(), strict=True):
        if isinstance(weight.grad, LowRankGrad):
            projected = dense.grad @ weight.grad.basis.detach()
            torch.testing.assert_close(
                weight.grad.factor, projected, rtol=0.05, atol=0.02 * float(projected.abs().max())
            )
        else:
            torch.testing.assert_close(weight.grad, dense.grad, rtol=0, atol=0)


def test_a_compiled_function_with_the_loss_and_its_backward_pass(kit) -> None:
    model = kit.Net()
    reference = copy.deepcopy(model)

    def step(x):
        loss = model(x).square().sum()
        loss.backward()
        return loss

    compiled = kit.compile_eager(step)
    compiled.run(kit.batch())
    kit.backward(reference, kit.batch())
    assert kit.count_low_rank(model, reference) == 4


def test_a_compiled_training_step_with_the_optimizer_in_it(kit) -> None:
    model, twin = kit.Net(), kit.Net()
    optimizers = [OasisAdamW(net.parameters(), lr=1e-2) for net in (model, twin)]

    def step(net, optimizer, x):
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    compiled, forward = kit.compile_eager(step), kit.compile_eager(twin)
    for number in range(3):
        compiled.run(model, optimizers[0], kit.batch(number))
        step(forward.run, optimizers[1], kit.batch(number))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert "basis" in optimizers[0].state[model.blocks[0].up.weight]


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no backward()")
def test_a_backward_pass_traced_into_the_graph_keeps_dense_gradients(kit) -> None:
    """There is no joint graph then: the gradients are outputs of a graph that needs none itself."""
    model = kit.Net()
    reference = copy.deepcopy(model)

    def step(x):
        loss = model(x).square().sum()
        loss.backward()
        return loss.detach()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = kit.compile_eager(step)
        compiled.run(kit.batch())
    kit.backward(reference, kit.batch())
    assert kit.count_low_rank(model, reference) == 0
    reasons = {row.reason for report in compiled.backend.report() for row in report.skipped}
    assert reasons == {"nothing that the graph returns needs gradients"}


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_autograd_trains_alike(kit, inner) -> None:
    models = kit.Net(), kit.Net()
    for model, with_it in zip(models, (False, True), strict=True):
        torch._dynamo.reset()
        optimizer = OasisAdamW(model.parameters(), lr=1e-2)
        reference = copy.deepcopy(model)
        with torch._dynamo.config.patch(compiled_autograd=with_it):
            compiled = torch.compile(model, backend=oasis_backend(rank=3, inner=inner))
            for step in range(3):
                reference.load_state_dict(model.state_dict())
                model.zero_grad(), reference.zero_grad()
                kit.backward(compiled, kit.batch(step)), kit.backward(reference, kit.batch(step))
                assert kit.count_low_rank(model, reference) == 4
                optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
