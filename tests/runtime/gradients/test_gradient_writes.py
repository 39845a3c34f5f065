"""A write into a low-rank gradient, by whatever way, leaves what it would leave in a dense one, for every alias."""

from __future__ import annotations

import pytest
import torch

from oasis_fx.runtime.gradients.low_rank_grad import LowRankGrad
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

pytestmark = pytest.mark.filterwarnings("ignore::oasis_fx.LowRankGradWarning")

M, N, RANK = 6, 8, 3


def gradients(shape=(M, N), features=(1, 2), channels_last=False) -> tuple[LowRankGrad, torch.Tensor]:
    """A low-rank gradient and the dense one that it stands for, laid out alike."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    if channels_last:
        weight = torch.nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    subspace = STORE.resolve([weight], SubspaceSpec(RANK), [features])
    rows = weight.numel() // subspace.shape[0]
    factor = torch.randn(rows, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = LowRankGrad(factor, subspace, weight, features=features)
    dense = torch.empty_strided(low.shape, low.stride(), dtype=low.dtype).copy_(low.to_dense())
    return low, dense


def other(g: torch.Tensor) -> torch.Tensor:
    return torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(1))


def each_row(g):
    for row in g:
        row.div_(2)


def write_through_numpy(g):
    g.detach().cpu().numpy()[0] = 7.0


def index_put(g):
    g[torch.tensor([0, 2]), torch.tensor([1, 1])] = 5.0


def masked(g):
    g[g > 0] = 0.0


def add_noise(g):
    g.add_(torch.randn(g.shape, dtype=g.dtype, generator=torch.Generator().manual_seed(3)), alpha=0.1)


def clip_value(g):
    weight = torch.nn.Parameter(torch.zeros_like(g))
    weight.grad = g
    torch.nn.utils.clip_grad_value_([weight], 0.3)


def set_item(key, value):
    def write(g):
        g[key] = value

    return write


WRITES = {
    # views and slices
    "rows = 0": set_item(slice(None, 4), 0),
    "row = 0": set_item(0, 0),
    "column = matrix": set_item((slice(None), 1), 2.0),
    "all = 0": set_item(slice(None), 0),
    "ellipsis = tensor": lambda g: set_item(..., other(g))(g),
    "rows.mul_": lambda g: g[:4].mul_(0.1),
    "rows.zero_": lambda g: g[2:].zero_(),
    "view.mul_": lambda g: g.view(-1).mul_(0.5),
    "flatten.mul_": lambda g: g.flatten().mul_(0.5),
    "reshape.add_": lambda g: g.reshape(-1).add_(1.0),
    "t.mul_": lambda g: g.t().mul_(0.5),
    "T.mul_": lambda g: g.T.mul_(0.5),
    "transpose.zero_": lambda g: g.transpose(0, 1)[0].zero_(),
    "each row": each_row,
    "unbind": lambda g: g.unbind(0)[1].fill_(3.0),
    "chunk": lambda g: g.chunk(2)[1].neg_(),
    "split": lambda g: g.split(2)[0].mul_(3),
    "narrow": lambda g: g.narrow(0, 1, 2).zero_(),
    "select": lambda g: g.select(1, 0).fill_(1.0),
    "diagonal": lambda g: g.diagonal().zero_(),
    "as_strided": lambda g: g.as_strided((2, 3), (1, 2)).fill_(9.0),
    "unsqueeze": lambda g: g.unsqueeze(0).mul_(2),
    "expand_as": lambda g: g.expand_as(g).mul_(2),
    "index_put": index_put,
    "masked": masked,
    # aliases
    "data.add_": lambda g: g.data.add_(other(g)),
    "detach.copy_": lambda g: g.detach().copy_(other(g)),
    "detach.clamp_": lambda g: g.detach().clamp_(-0.1, 0.1),
    "data[:2]": lambda g: set_item(slice(None, 2), 0)(g.data),
    "numpy": write_through_numpy,
    "dlpack": lambda g: torch.from_dlpack(g).mul_(2),
    # in place, as a whole
    "clamp_": lambda g: g.clamp_(-0.1, 0.1),
    "masked_fill_": lambda g: g.masked_fill_(torch.ones(g.shape, dtype=torch.bool).tril(), 0.0),
    "mul_(matrix)": lambda g: g.mul_(other(g)),
    "mul_(one element)": lambda g: g.mul_(torch.tensor([0.5], dtype=torch.float64)),
    "mul_(scalar tensor)": lambda g: g.mul_(torch.tensor(0.5, dtype=torch.float64)),
    "*=": lambda g: g.__imul__(0.25),
    "neg_": lambda g: g.neg_(),
    "index_fill_": lambda g: g.index_fill_(0, torch.tensor([1]), 4.0),
    "index_add_": lambda g: g.index_add_(0, torch.tensor([1]), torch.ones(1, N, dtype=torch.float64)),
    "nan_to_num(out=)": lambda g: torch.nan_to_num(g, out=g),
    "nan_to_num_": lambda g: g.nan_to_num_(),
    "add(out=)": lambda g: torch.add(other(g), 1.0, out=g),
    "lerp_": lambda g: g.lerp_(other(g), 0.3),
    "addcmul_": lambda g: g.addcmul_(other(g), other(g), value=0.1),
    "addmm_": lambda g: g.addmm_(other(g), torch.ones(N, N, dtype=torch.float64)),
    "add_(number)": lambda g: g.add_(1.0),
    "sub_": lambda g: g.sub_(other(g)),
    "fill_": lambda g: g.fill_(1.5),
    "copy_": lambda g: g.copy_(other(g)),
    "sign_": lambda g: g.sign_(),
    "add noise": add_noise,
    "foreach_add_": lambda g: torch._foreach_add_([g], 1.0),
    "foreach_add_(list)": lambda g: torch._foreach_add_([g], [other(g)]),
    "foreach_mul_(list)": lambda g: torch._foreach_mul_([g], [other(g)]),
    "foreach_mul_(scalars)": lambda g: torch._foreach_mul_([g], [0.5]),
    "foreach_clamp_max_": lambda g: torch._foreach_clamp_max_([g], 0.2),
    "clip_grad_value_": clip_value,
    "apply_": lambda g: g.apply_(lambda value: value * 2),
    "map_": lambda g: g.map_(other(g), lambda a, b: a + b),
    "storage": lambda g: g.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("features", [(1, 2), (0, 1)], ids=["linear", "transposed"])
@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in WRITES.items()])
def test_a_write_is_that_into_a_dense_gradient(write, features) -> None:
    low, dense = gradients(features=features)
    weight = torch.nn.Parameter(torch.zeros_like(dense))
    weight.grad = low
    alias, data = low.detach(), low.data
    write(dense), write(weight.grad)
    for found in (low, weight.grad, alias, data, low.detach()):
        torch.testing.assert_close(found.to_dense(), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(low.norm(), dense.norm())


CONVOLUTION_WRITES = {
    "rows = 0": set_item(slice(None, 2), 0),
    "view": lambda g: g.permute(0, 2, 3, 1).reshape(-1)[:9].fill_(3.0),
    "as_strided": lambda g: g.as_strided((3,), (2,)).fill_(2.0),
    "channel": lambda g: g[:, 1].mul_(0.5),
    "storage": lambda g: g.untyped_storage().fill_(0),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("write", [pytest.param(write, id=name) for name, write in CONVOLUTION_WRITES.items()])
def test_a_write_into_a_convolutions_gradient(write, channels_last) -> None:
    low, dense = gradients((4, 2, 3, 3), (1, 4), channels_last)
    assert low.stride() == dense.stride()
    write(dense), write(low)
    torch.testing.assert_close(low.to_dense(), dense)


def test_a_write_through_a_view_that_was_taken_before_is_seen() -> None:
    low, dense = gradients()
    view, dense_view = low[1:3], dense[1:3]
    low.mul_(2), dense.mul_(2)
    view.add_(1.0), dense_view.add_(1.0)
    torch.testing.assert_close(low.to_dense(), dense)
    torch.testing.assert_close(view, dense_view)


@pytest.mark.parametrize(
    "write",
    [
        lambda g: g.t_(),
        lambda g: g.transpose_(0, 1),
        lambda g: g.unsqueeze_(0),
        lambda g: g.squeeze_(),
        lambda g: g.resize_(2, 2),
        lambda g: g.resize_as_(torch.zeros(2, 2)),
        lambda g: g.as_strided_((2, 2), (1, 1)),
        lambda g: g.set_(torch.zeros(2, 2, dtype=torch.float64)),
    ],
)
def test_a_change_of_shape_or_storage_is_refused_and_changes_nothing(write) -> None:
    low, dense = gradients()
    with pytest.raises(RuntimeError, match=r"to_dense\(\)"):
        write(low)
    assert low.is_low_rank
    torch.testing.assert_close(low.to_dense(), dense)


def test_what_is_assigned_to_data_is_the_gradient_and_other_aliases_stay() -> None:
    for low, dense in (gradients(), gradients(features=(0, 1))):
        weight = torch.nn.Parameter(torch.zeros_like(dense))
        weight.grad, alias, before = low, low.detach(), dense.clone()
        values = other(dense)
        weight.grad.data = values
        torch.testing.assert_close(weight.grad.to_dense(), values)
        torch.testing.assert_close(alias.to_dense(), before)
        values[0] = 7.0  # the gradient's own memory
        torch.testing.assert_close(weight.grad.to_dense(), values)


def test_a_module_that_is_cast_takes_its_gradient_along() -> None:
    layer = torch.nn.Linear(N, M, bias=False).double()
    low, dense = gradients()
    layer.weight.grad = low
    layer.float()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.factor.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad.to_dense(), dense.float())
    layer.double()
    torch.testing.assert_close(layer.weight.grad.to_dense(), dense.float().double())
    layer.weight.grad[0] = 0
    assert layer.weight.grad.to_dense()[0].norm() == 0


def test_data_of_another_shape_is_refused() -> None:
    low, _ = gradients()
    with pytest.raises(ValueError, match=r"shape \(2, 2\).*must have shape \(6, 8\)"):
        low.data = torch.zeros(2, 2, dtype=torch.float64)


READS = {
    "numpy": lambda g: torch.from_numpy(g.numpy().copy()),
    "cpu.numpy": lambda g: torch.from_numpy(g.detach().cpu().numpy().copy()),
    "tolist": lambda g: torch.tensor(g.tolist(), dtype=torch.float64),
    "asarray": lambda g: torch.from_numpy(__import__("numpy").asarray(g).copy()),
    "item": lambda g: torch.tensor(g[0, 0].item(), dtype=torch.float64),
    "histogram": lambda g: torch.histc(g, 4),
    "cat": lambda g: torch.cat([g.view(-1), g.view(-1)]),
    "stack": lambda g: torch.stack([g, g]),
    "vector": lambda g: torch.nn.utils.parameters_to_vector([g]),
    "data_ptr": lambda g: torch.tensor(g.data_ptr() != 0),
}


@pytest.mark.parametrize("read", [pytest.param(read, id=name) for name, read in READS.items()])
def test_what_reads_the_memory_of_a_gradient_works(read) -> None:
    low, dense = gradients()
    torch.testing.assert_close(read(low), read(dense))
    torch.testing.assert_close(low.to_dense(), dense)


def test_safetensors(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    low, dense = gradients()
    save_file({"gradient": low}, tmp_path / "g.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "g.safetensors")["gradient"], dense)


@torch.library.custom_op("oasis_fx_tests::doubles_without_saying_so", mutates_args=())
def doubles_without_saying_so(x: torch.Tensor) -> None:
    x.mul_(2)


def test_an_operator_outside_of_aten_may_write_without_declaring_it() -> None:
    low, dense = gradients()
    torch.ops.oasis_fx_tests.doubles_without_saying_so(low)
    torch.testing.assert_close(low.to_dense(), 2 * dense)


def test_a_copy_is_a_copy() -> None:
    low, dense = gradients()
    copies = [low.clone(), low.to(torch.float64, copy=True), 1.0 * low, low + 0.0 * low]
    low[:] = 0
    for copy in copies:
        torch.testing.assert_close(copy.to_dense(), dense)
    assert torch.equal(low.clone(), torch.zeros_like(dense))
