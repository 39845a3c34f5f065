"""However a product of a weight is spelled, its gradient is low-rank and right; what stays dense has its reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from oasis_fx import LowRankGrad
from oasis_fx._torch.compiler import compile_caches_disabled
from oasis_fx.backend import OasisBackend
from oasis_fx.compile.lowering import run_node_by_node
from oasis_fx.settings import Settings

D = torch.float64
aten = torch.ops.aten
ZERO = torch.zeros(5, dtype=D)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 6)


# x is [3,4,6]; the weight's shape stands behind what is computed with it.
TRANSPOSES = {
    "w.transpose(dim0=, dim1=)": (lambda x, w: x @ w.transpose(dim0=0, dim1=1), (5, 6)),
    "torch.transpose(input=, dim0=, dim1=)": (lambda x, w: x @ torch.transpose(input=w, dim0=0, dim1=1), (5, 6)),
    "w.permute(dims=)": (lambda x, w: x @ w.permute(dims=(1, 0)), (5, 6)),
    "torch.permute(input=, dims=)": (lambda x, w: x @ torch.permute(input=w, dims=(1, 0)), (5, 6)),
    "w.swapaxes(axis0=, axis1=)": (lambda x, w: x @ w.swapaxes(axis0=0, axis1=1), (5, 6)),
    "torch.swapdims(input=, dim0=, dim1=)": (lambda x, w: x @ torch.swapdims(input=w, dim0=0, dim1=1), (5, 6)),
    "w.movedim": (lambda x, w: x @ w.movedim(0, 1), (5, 6)),
    "torch.movedim(source=, destination=)": (lambda x, w: x @ torch.movedim(w, source=0, destination=1), (5, 6)),
    "torch.moveaxis": (lambda x, w: x @ torch.moveaxis(w, 0, 1), (5, 6)),
    "w.adjoint": (lambda x, w: x @ w.adjoint(), (5, 6)),
    "w.H": (lambda x, w: x @ w.H, (5, 6)),
    "w.mH": (lambda x, w: x @ w.mH, (5, 6)),
    "w.mT": (lambda x, w: x @ w.mT, (5, 6)),
    "torch.t(input=)": (lambda x, w: x @ torch.t(input=w), (5, 6)),
    "aten.t": (lambda x, w: x @ aten.t.default(w), (5, 6)),
    "aten.permute": (lambda x, w: x @ aten.permute.default(w, [1, 0]), (5, 6)),
    "a transpose of a transpose": (lambda x, w: x @ w.t().transpose(0, 1).mT, (5, 6)),
    "one output": (lambda x, w: x @ w.mT, (1, 6)),
    "one feature": (lambda x, w: x[..., :1] @ w.mT, (5, 1)),
}
PRODUCTS = {
    "mm(input=, mat2=)": (lambda x, w: torch.mm(input=flat(x), mat2=w), (6, 5)),
    "mm(mat2=, input=)": (lambda x, w: torch.mm(mat2=w, input=flat(x)), (6, 5)),
    "x.mm(mat2=)": (lambda x, w: flat(x).mm(mat2=w), (6, 5)),
    "mm(input=weight)": (lambda x, w: torch.mm(input=w, mat2=flat(x).t()), (5, 6)),
    "matmul(input=, other=)": (lambda x, w: torch.matmul(input=x, other=w), (6, 5)),
    "x.matmul(other=)": (lambda x, w: x.matmul(other=w), (6, 5)),
    "w.__rmatmul__": (lambda x, w: w.__rmatmul__(x), (6, 5)),
    "linalg.matmul": (lambda x, w: torch.linalg.matmul(x, w), (6, 5)),
    "linalg.multi_dot": (lambda x, w: torch.linalg.multi_dot([flat(x), w]), (6, 5)),
    "addmm(mat1=, mat2=)": (lambda x, w: torch.addmm(input=ZERO, mat1=flat(x), mat2=w), (6, 5)),
    "x.addmm(mat1=, mat2=)": (lambda x, w: ZERO.expand(12, 5).addmm(mat1=flat(x), mat2=w), (6, 5)),
    "bmm(input=, mat2=)": (lambda x, w: torch.bmm(input=x, mat2=w), (3, 6, 5)),
    "baddbmm(batch1=, batch2=)": (lambda x, w: torch.baddbmm(input=ZERO, batch1=x, batch2=w), (3, 6, 5)),
    "linear(weight=, input=)": (lambda x, w: F.linear(weight=w, input=x), (5, 6)),
    "aten.linear": (lambda x, w: aten.linear.default(x, w), (5, 6)),
    "aten.linear, a packet": (lambda x, w: aten.linear(x, w), (5, 6)),
    "aten.mm": (lambda x, w: aten.mm.default(flat(x), w), (6, 5)),
    "aten.mm(self=, mat2=)": (lambda x, w: aten.mm.default(self=flat(x), mat2=w), (6, 5)),
    "aten.matmul": (lambda x, w: aten.matmul.default(x, w), (6, 5)),
    "aten.addmm": (lambda x, w: aten.addmm.default(ZERO, flat(x), w), (6, 5)),
    "inner": (lambda x, w: torch.inner(x, w), (5, 6)),
    "inner(input=, other=)": (lambda x, w: torch.inner(input=x, other=w), (5, 6)),
    "x.inner": (lambda x, w: x.inner(w), (5, 6)),
    "inner, weight first": (lambda x, w: torch.inner(w, x), (5, 6)),
    "tensordot": (lambda x, w: torch.tensordot(x, w, dims=([2], [1])), (5, 6)),
    "tensordot(a=, b=)": (lambda x, w: torch.tensordot(a=x, b=w, dims=([-1], [-1])), (5, 6)),
    "tensordot, a number of dimensions": (lambda x, w: torch.tensordot(x, w, dims=1), (6, 5)),
    "tensordot, weight first": (lambda x, w: torch.tensordot(w, x, dims=([1], [2])), (5, 6)),
    "tensordot over two dimensions": (lambda x, w: torch.tensordot(x, w, dims=2), (4, 6, 5)),
    "einsum of a list": (lambda x, w: torch.einsum("bsn,mn->bsm", [x, w]), (5, 6)),
    "einsum without an arrow": (lambda x, w: torch.einsum("bsn,mn", x, w), (5, 6)),
    "einsum with dots": (lambda x, w: torch.einsum("...n,mn->...m", x, w), (5, 6)),
    "einsum of sublists": (lambda x, w: torch.einsum(x, [0, 1, 2], w, [3, 2], [0, 1, 3]), (5, 6)),
    "einsum of three": (lambda x, w: torch.einsum("bsn,mn,m->bsm", x, w, ZERO + 1), (5, 6)),
    "einsum of heads": (lambda x, w: torch.einsum("bsn,nhd->bshd", x, w), (6, 2, 3)),
    "conv1d(input=, weight=)": (lambda x, w: F.conv1d(input=x, weight=w, stride=2), (5, 4, 2)),
    "convolution": (lambda x, w: torch.convolution(x, w, None, (2,), (0,), (1,), False, (0,), 1), (5, 4, 2)),
    "aten.conv1d": (lambda x, w: aten.conv1d.default(x, w, None, [2]), (5, 4, 2)),
    "aten.convolution": (lambda x, w: aten.convolution.default(x, w, None, [2], [0], [1], False, [0], 1), (5, 4, 2)),
    "vmap": (lambda x, w: torch.func.vmap(lambda row: F.linear(row, w))(x), (5, 6)),
}
PARTS = {
    "chunk(chunks=, dim=)": (lambda x, w: sum(F.linear(x, p) for p in w.chunk(chunks=2, dim=0)), (4, 6)),
    "chunk twice": (lambda x, w: F.linear(x, w.chunk(2)[0]) * F.linear(x, w.chunk(2)[1]), (4, 6)),
    "chunk three times": (
        lambda x, w: F.linear(x, w.chunk(2)[0]) * F.linear(x, w.chunk(2)[1]) + F.linear(x, w.chunk(2)[0]).tanh(),
        (4, 6),
    ),
    "the first chunk alone": (lambda x, w: F.linear(x, w.chunk(2)[0]), (4, 6)),
    "the last chunk alone": (lambda x, w: F.linear(x, w.chunk(2)[1]), (4, 6)),
    "chunks of a row": (lambda x, w: sum(F.linear(x, p) for p in w.chunk(4)), (4, 6)),
    "w.split(split_size=)": (lambda x, w: sum(F.linear(x, p) for p in w.split(split_size=2)), (4, 6)),
    "torch.split(tensor=, split_size_or_sections=)": (
        lambda x, w: torch.cat([F.linear(x, p) for p in torch.split(tensor=w, split_size_or_sections=[1, 3])], -1),
        (4, 6),
    ),
    "unsafe_chunk": (lambda x, w: sum(F.linear(x, p) for p in torch.unsafe_chunk(w, 2)), (4, 6)),
    "slices": (lambda x, w: F.linear(x, w[:1]) * F.linear(x, w[1:]), (4, 6)),
    "a slice in the middle": (lambda x, w: F.linear(x, w[1:-1]), (4, 6)),
    "chunk and slice": (lambda x, w: F.linear(x, w.chunk(2)[0]) * F.linear(x, w[2:]), (4, 6)),
    "narrow(dim=, start=, length=)": (lambda x, w: F.linear(x, w.narrow(dim=0, start=1, length=2)), (4, 6)),
    "unbind": (lambda x, w: sum(F.linear(x, p) for p in w.unbind(0)), (3, 4, 6)),
    "unbind and index": (lambda x, w: F.linear(x, w.unbind()[0]) * F.linear(x, w[2]), (3, 4, 6)),
    "an index": (lambda x, w: F.linear(x, w[-1]), (3, 4, 6)),
    "an index of a weight that is stored transposed": (lambda x, w: x @ w[1], (2, 6, 4)),
    "a slice of experts": (lambda x, w: torch.bmm(x[:2], w[1:]), (3, 6, 4)),
}
VIEWS = {
    "w.view": (lambda x, w: F.linear(x, w.view(4, 6)), (2, 2, 6)),
    "w.flatten(start_dim=, end_dim=)": (lambda x, w: F.linear(x, w.flatten(start_dim=0, end_dim=1)), (2, 2, 6)),
    "w.unsqueeze": (lambda x, w: F.linear(x, w.unsqueeze(dim=0).squeeze(dim=0)), (4, 6)),
    "w.clone": (lambda x, w: F.linear(x, w.clone(memory_format=torch.contiguous_format)), (4, 6)),
    "w.contiguous of a transpose": (lambda x, w: F.linear(x, w.t().contiguous()), (6, 4)),
    "aten.alias": (lambda x, w: F.linear(x, aten.alias.default(w)), (4, 6)),
    "x.view(size=)": (lambda x, w: F.linear(x.view(size=(12, 6)), w), (4, 6)),
    "x.flatten(start_dim=)": (lambda x, w: F.linear(x.flatten(start_dim=0, end_dim=1), w), (4, 6)),
    "torch.reshape(input=, shape=)": (lambda x, w: F.linear(torch.reshape(input=x, shape=(12, 6)), w), (4, 6)),
    "w.to(dtype=)": (lambda x, w: F.linear(x, w.to(dtype=D)), (4, 6)),
    "and detached beside it": (lambda x, w: F.linear(x, w) * (x @ w.detach()), (6, 6)),
}
LEFT = {
    "a part and the whole": (lambda x, w: F.linear(x, w)[..., :2] * F.linear(x, w[:2]), (4, 6), "parts that overlap"),
    "a part of the features": (lambda x, w: F.linear(x[..., :3], w[:, :3]), (4, 6), "put together along its features"),
    "every second row": (lambda x, w: F.linear(x, w[::2]), (4, 6), "only getitem"),
    "experts' rows": (lambda x, w: torch.bmm(x, w[:, :, 1:]), (3, 6, 4), "or from parts of rows"),
    "a view that splits rows": (lambda x, w: torch.einsum("bsn,hdn->bshd", x, w.view(2, 2, 6)), (4, 6), "only view"),
    "an expanded weight": (lambda x, w: torch.bmm(x, w.expand(3, 6, 5)), (6, 5), "only expand"),
    "bilinear": (lambda x, w: F.bilinear(x, x, w), (5, 6, 6), "only bilinear"),
    "mv": (lambda x, w: torch.mv(w, x[0, 0]), (5, 6), "only mv"),
    "alpha of addmm": (lambda x, w: torch.addmm(ZERO, flat(x), w, alpha=0.5), (6, 5), "not a matmul"),
    "groups": (lambda x, w: F.conv1d(x, w, groups=2), (6, 2, 2), "conv1d with groups"),
}
LOW_RANK = TRANSPOSES | PRODUCTS | PARTS | VIEWS


class Spelled(torch.nn.Module):
    """A weight of its own for each spelling, all of one activation, in one graph."""

    def __init__(self, spellings, around=lambda function, *given: function(*given)) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.functions, self.around = [spelling[0] for spelling in spellings.values()], around
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(spelling[1], dtype=D, generator=generator))
            for spelling in spellings.values()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = [self.around(f, x, w) for f, w in zip(self.functions, self.weights, strict=True)]
        return sum(result.square().sum() for result in results)


def compare(spellings, inner: str, around=None) -> tuple[dict[str, bool], dict[str, str]]:
    """Compare all gradients with eager's at full rank; which are low-rank, and the reasons of those that are not."""
    model = Spelled(spellings) if around is None else Spelled(spellings, around)
    reference = copy.deepcopy(model)
    x, same = (torch.randn(3, 4, 6, dtype=D, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    reference(x).backward()
    # Inductor's decompositions, but not its code.
    backend = OasisBackend(Settings(rank=100, inner=inner, exclude=()), inner_compile=run_node_by_node)
    with compile_caches_disabled():
        torch.compile(model, backend=backend, fullgraph=True)(same).backward()
    torch.testing.assert_close(same.grad, x.grad, rtol=1e-10, atol=1e-10)
    low = {}
    for name, weight, dense in zip(spellings, model.weights, reference.weights, strict=True):
        low[name] = isinstance(weight.grad, LowRankGrad)
        found = weight.grad.to_dense() if low[name] else weight.grad
        torch.testing.assert_close(found, dense.grad, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
    (record,) = backend.compiled_graphs()
    reasons = dict(record.reasons) | {one.weight: one.reason for one in record.trace.skipped}
    return low, {list(spellings)[int(record.names[at].split(".")[-1])]: why for at, why in reasons.items()}


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_spelling_is_rewritten_and_right(inner) -> None:
    low, reasons = compare(LOW_RANK, inner)
    assert all(low.values()), reasons


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_what_is_not_rewritten_is_right_and_says_why(inner) -> None:
    low, reasons = compare(LEFT, inner)
    assert not any(low.values())
    for name, (_, _, why) in LEFT.items():
        assert why in reasons[name], name


@pytest.mark.filterwarnings("ignore:dynamo_pgo")
def test_within_a_checkpointed_region() -> None:
    spellings = dict(list((TRANSPOSES | PARTS).items())[::3] + list((PRODUCTS | VIEWS).items())[::6])
    low, reasons = compare(spellings, "aot_eager", lambda f, x, w: checkpoint(f, x, w, use_reentrant=False))
    assert all(low.values()), reasons
