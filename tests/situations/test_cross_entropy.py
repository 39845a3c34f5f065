"""Ways to keep the logits of a large vocabulary small, beside rewritten blocks (docs/cross_entropy.md)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from oasis_fx import LowRankGrad, OasisBackend, oasis_backend
from oasis_fx.compile.lowering import run_node_by_node
from oasis_fx.settings import Settings

TOKENS, VOCABULARY = 64, 512
AUTO_CHUNKER = {
    "auto_chunker.enable": True,
    "auto_chunker.num_chunk": 4,
    "auto_chunker.output_size_threshold": 1,  # the model is small
    "auto_chunker.amplify_ratio_threshold": 1,
}

OLDER = "F.linear_cross_entropy came with torch 2.13, and this torch is older"


def whole(x, weight, target):
    return F.cross_entropy(x @ weight.T, target)


def checkpointed(x, weight, target):
    def part(x, target):
        return F.cross_entropy(x @ weight.T, target, reduction="sum")

    chunks = zip(x.chunk(4), target.chunk(4), strict=True)
    return sum(checkpoint(part, a, b, use_reentrant=False) for a, b in chunks) / target.numel()


def of_torch(x, weight, target):
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(x, weight, target, options=options)


class Model(torch.nn.Module):
    """Two layers and a head that stays dense by its name."""

    def __init__(self, loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)
        self.lm_head = torch.nn.Linear(16, VOCABULARY, bias=False)
        self.loss = loss

    def body(self, x):
        return x + self.down(torch.tanh(self.up(x)))

    def forward(self, x, target):
        return self.loss(self.body(x), self.lm_head.weight, target)


def batch():
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(TOKENS, 16, generator=generator),
        torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
    )


def compare(model, loss) -> None:
    """The loss, the head's dense gradient and the layers' low-rank ones are those of the whole logits in eager mode."""
    reference = Model(whole)
    x, target = batch()
    expected = reference(x, target)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    rewritten = []
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        found, dense = p.grad, q.grad
        if isinstance(found, LowRankGrad):
            rewritten.append(name)
            found, dense = found.factor, dense @ found.basis.detach()
        torch.testing.assert_close(found, dense, msg=name, rtol=1e-4, atol=1e-7)
    assert rewritten == ["up.weight", "down.weight"]


def has_whole_logits(graph) -> bool:
    values = (node.meta.get("val") for node in graph.nodes)
    return any(isinstance(v, torch.Tensor) and v.numel() >= TOKENS * VOCABULARY for v in values)


@pytest.mark.parametrize("chunked", [False, True])
def test_the_auto_chunker_runs_before_our_passes(chunked) -> None:
    model = Model(whole)
    # Inductor's passes, whose one this is, without its code generation.
    backend = OasisBackend(Settings(rank=4, options=AUTO_CHUNKER if chunked else {}), run_node_by_node)
    compare(model, torch.compile(model, backend=backend)(*batch()))
    (record,) = backend.compiled_graphs()
    trace = record.trace or record.retrace()
    assert len(trace.sites) == 2
    assert has_whole_logits(trace.after.graph) != chunked
    assert has_whole_logits(trace.forward.graph) != chunked and has_whole_logits(trace.backward.graph) != chunked


def test_checkpointed_chunks_in_the_graph() -> None:
    model = Model(checkpointed)
    compare(model, torch.compile(model, backend=oasis_backend(rank=4, inner="aot_eager"))(*batch()))


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"),
    reason=OLDER,
)
def test_torchs_own_in_the_graph() -> None:
    model = Model(of_torch)
    backend = oasis_backend(rank=4, inner="aot_eager")
    compare(model, torch.compile(model, backend=backend, fullgraph=True)(*batch()))


@pytest.mark.parametrize("loss", ["checkpointed", "torch"])
def test_a_loss_outside_of_the_graph(loss) -> None:
    if loss == "torch" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip(OLDER)
    model = Model({"checkpointed": checkpointed, "torch": of_torch}[loss])
    (x, target) = batch()
    body = torch.compile(model.body, backend=oasis_backend(rank=4, inner="aot_eager"))
    compare(model, model.loss(body(x), model.lm_head.weight, target))


def test_a_head_may_be_rewritten_beside_chunks_that_are_checkpointed() -> None:
    model = Model(checkpointed)
    reference = copy.deepcopy(model)
    x, target = batch()
    reference(x, target).backward()
    torch.compile(model, backend=oasis_backend(rank=4, inner="aot_eager", exclude=[]))(x, target).backward()
    gradient = model.lm_head.weight.grad
    assert isinstance(gradient, LowRankGrad) and gradient.basis is not None
    expected = reference.lm_head.weight.grad @ gradient.basis.detach()
    torch.testing.assert_close(gradient.factor, expected, rtol=1e-4, atol=1e-7)


def test_behind_a_graph_break_a_head_has_lost_its_name() -> None:
    """A limit, held here so that its end is seen: Dynamo names it after an argument of the function that it resumes."""

    def broken(x, weight, target):
        torch._dynamo.graph_break()
        return whole(x, weight, target)

    model = Model(broken)
    backend = oasis_backend(rank=4, inner="aot_eager")
    torch.compile(model, backend=backend)(*batch()).backward()
    assert isinstance(model.lm_head.weight.grad, LowRankGrad)
    names = {name for record in backend.compiled_graphs() for name in record.names.values()}
    assert "lm_head.weight" not in names
