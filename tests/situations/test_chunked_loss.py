"""The chunked cross-entropy: equal to that of whole logits, eager and compiled, and never whole."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from oasis_fx import LowRankGrad, oasis_backend
from oasis_fx.chunked_loss import _in_chunks, chunked_cross_entropy

TOKENS, VOCABULARY, WIDTH = 33, 50, 8


def case(dtype: torch.dtype, bias: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, TOKENS // 3, WIDTH), (VOCABULARY, WIDTH)] + [(VOCABULARY,)] * bias
    given = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    target = torch.randint(VOCABULARY, (3, TOKENS // 3), generator=generator)
    target[0, :4] = -100
    return [tensor.requires_grad_() for tensor in given], target


def whole(hidden, weight, bias, target, **settings) -> torch.Tensor:
    logits = F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), **settings)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)],
)
def test_loss_and_gradients_are_those_of_whole_logits(dtype, tolerance, bias, smoothing, reduction) -> None:
    given, target = case(dtype, bias)
    hidden, weight, *rest = given
    settings = {"label_smoothing": smoothing, "reduction": reduction}
    loss = chunked_cross_entropy(hidden, weight, target, *rest, num_chunks=4, **settings)
    expected = whole(hidden, weight, rest[0] if bias else None, target, **settings)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    found = torch.autograd.grad(3 * loss, given)
    for one, other in zip(found, torch.autograd.grad(3 * expected, given), strict=True):
        assert one.dtype == dtype
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < tolerance


@pytest.mark.parametrize("num_chunks", [1, 7, 100])
def test_chunks_of_any_number(num_chunks) -> None:
    given, target = case(torch.float64, False)
    loss = chunked_cross_entropy(*given, target, num_chunks=num_chunks)
    expected = whole(*given, None, target)
    torch.testing.assert_close(torch.autograd.grad(loss, given), torch.autograd.grad(expected, given))


def test_rows_that_do_not_count_have_no_gradient() -> None:
    (hidden, weight), target = case(torch.float64, False)
    chunked_cross_entropy(hidden, weight, target).backward()
    assert (hidden.grad[0, :4] == 0).all() and (hidden.grad[0, 4:] != 0).any()


def test_under_autocast_the_product_is_in_its_dtype() -> None:
    (hidden, weight), target = case(torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, target)
    expected = chunked_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target)
    assert torch.equal(loss, expected) and loss.dtype == torch.float32
    found = torch.autograd.grad(loss, (hidden, weight))
    assert [gradient.dtype for gradient in found] == [torch.float32] * 2


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operator returned."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return result


def test_logits_are_never_whole() -> None:
    hidden, weight, target = torch.randn(4096, 4), torch.randn(64, 4), torch.randint(64, (4096,))
    with Largest() as largest:
        _in_chunks(hidden, weight, None, target, 8, -100, 0.1)
    assert largest.seen == 4096 * 64 // 8


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_in_a_compiled_graph_the_rest_is_rewritten(inner) -> None:
    torch.manual_seed(0)
    layer, head = torch.nn.Linear(8, 16), torch.nn.Linear(16, VOCABULARY, bias=False)

    def loss(x, target):
        return chunked_cross_entropy(torch.tanh(layer(x)), head.weight, target, num_chunks=4)

    x, target = torch.randn(TOKENS, 8), torch.randint(VOCABULARY, (TOKENS,))
    F.cross_entropy(F.linear(torch.tanh(layer(x)), head.weight), target).backward()
    expected = [layer.weight.grad, head.weight.grad]
    layer.zero_grad(), head.zero_grad()
    backend = oasis_backend(rank=4, inner=inner, memory_budget=0.1)
    torch.compile(loss, backend=backend, fullgraph=True)(x, target).backward()
    assert isinstance(layer.weight.grad, LowRankGrad)
    torch.testing.assert_close(layer.weight.grad.factor, expected[0] @ layer.weight.grad.basis.detach())
    torch.testing.assert_close(head.weight.grad, expected[1])
    (record,) = backend.compiled_graphs()
    trace = record.trace or record.retrace()
    nodes = [*trace.forward.graph.nodes, *trace.backward.graph.nodes]
    assert (
        sum("chunked_cross_entropy" in str(node.target) for node in nodes) == 1
    )  # under a budget, too, nothing recomputes it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_chunks": 0}, "num_chunks is 0"),
        ({"label_smoothing": 2.0}, r"label_smoothing is 2\.0"),
        ({"reduction": "none"}, "reduction is 'none'"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target has the shape \(3,\)"),
        ({"weight": torch.zeros(5, 3)}, r"weight has the shape \(5, 3\)"),
    ],
)
def test_what_cannot_be_is_refused(change, message) -> None:
    (hidden, weight), target = case(torch.float32, False)
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**{"hidden": hidden, "weight": weight, "target": target} | change)
