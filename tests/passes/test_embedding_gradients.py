"""The gradient of a 16-bit embedding: the numbers of the dense sum, without a float32 copy of the table."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import OasisBackend, oasis_backend

VOCABULARY, WIDTH = 500, 8


class Net(torch.nn.Module):
    """Reads a table once or twice; ``tied`` is its output head too."""

    def __init__(self, *, twice: bool = False, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, WIDTH, padding_idx=padding)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        self.twice, self.tied = twice, tied

    def forward(self, tokens):
        x = self.table(tokens)
        if self.twice:
            x = x + self.table(tokens.flip(0))
        x = self.layer(x)
        return (x @ self.table.weight.T if self.tied else x).float().square().sum()


def tokens_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Few tokens, many times, and the last one of the table."""
    tokens = torch.randint(6, (rows, columns), generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = VOCABULARY - 1
    return tokens


def gradient(net: Net, tokens: torch.Tensor, backend: object, dynamic: bool | None = None) -> torch.Tensor:
    torch._dynamo.reset()
    net.zero_grad()
    torch.compile(net, backend=backend, dynamic=dynamic)(tokens).backward()
    assert net.table.weight.grad is not None
    return net.table.weight.grad.clone()


def float32_tables(backend: OasisBackend) -> list[str]:
    """Of the rewritten joint graph."""
    (record,) = backend.compiled_graphs()
    trace = record.trace or record.retrace()
    tensors = [node for node in trace.after.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    shape = (VOCABULARY, WIDTH)
    return [n.name for n in tensors if n.meta["val"].shape == shape and n.meta["val"].dtype == torch.float32]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param({}, torch.float16, marks=pytest.mark.slow),
        pytest.param({"twice": True}, torch.bfloat16, marks=pytest.mark.slow),
        ({"tied": True}, torch.bfloat16),
        ({"padding": 3}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_dense_sum(kind, dtype) -> None:
    net = Net(**kind).to(dtype)
    tokens = tokens_of(4, 12)
    backend = oasis_backend(rank=4)
    found = gradient(net, tokens, backend)
    assert float32_tables(backend) == []
    expected = gradient(net, tokens, "inductor")
    assert expected.any() and torch.equal(found, expected)
    if kind.get("padding"):
        assert not found[3].any()


@pytest.mark.slow
def test_sizes_may_vary() -> None:
    net = Net().bfloat16()
    backend = oasis_backend(rank=4)
    torch._dynamo.reset()
    compiled, stock = torch.compile(net, backend=backend, dynamic=True), torch.compile(net, dynamic=True)
    for columns in (12, 20):
        gradients = []
        for one in (compiled, stock):
            net.zero_grad()
            one(tokens_of(4, columns)).backward()
            gradients.append(net.table.weight.grad.clone())
        assert torch.equal(*gradients)
    assert float32_tables(backend) == []


def test_rows_of_one_token_are_summed_in_float32() -> None:
    """240 equal rows: their sum is 240 times one of them, to one rounding. Sums in bfloat16 would stop at 256 times."""
    net = Net().bfloat16()
    tokens = torch.full((1, 240), 5)
    many = gradient(net, tokens, oasis_backend(rank=4))
    one = gradient(net, tokens[:, :1], "aot_eager")
    torch.testing.assert_close(many[5].float(), 240 * one[5].float(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(("dtype", "columns"), [(torch.float32, 12), (torch.bfloat16, 80)])
def test_what_would_gain_nothing_stays_as_it_is(dtype, columns) -> None:
    net = Net().to(dtype)
    backend = oasis_backend(rank=4)
    gradient(net, tokens_of(4, columns), backend)
    assert float32_tables(backend) != []


def test_rows_that_are_broadcast_are_left_to_torch() -> None:
    """One row for all places: a sum in a float32 table, too, but not that of an embedding."""

    class Broadcast(Net):
        def forward(self, tokens):
            table = torch.zeros(VOCABULARY, WIDTH)
            sums = table.index_put((tokens.flatten(),), self.layer.weight[0].float(), accumulate=True).bfloat16()
            return super().forward(tokens) + sums.float().square().sum()

    net, tokens = Broadcast().bfloat16(), tokens_of(4, 12)
    backend = oasis_backend(rank=4)
    found = gradient(net, tokens, backend)
    assert float32_tables(backend) != []
    assert torch.equal(found, gradient(net, tokens, "inductor"))
