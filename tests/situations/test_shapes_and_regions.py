"""Sizes that vary, blocks compiled one by one, mixes, graph breaks, checkpointed regions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from oasis_fx import OasisAdamW, oasis_backend

EAGER = {"inner": "aot_eager"}


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(8, 8) for _ in range(4))
        self.double()

    def forward(self, x, padding=None):
        mask = None if padding is None else padding[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        heads = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return self.o(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("marked", [False, True])
def test_sequence_lengths_vary(kit, marked) -> None:
    model = Attention()
    reference = copy.deepcopy(model)
    compiled = kit.compile_eager(model)
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)
    subspaces, states = set(), set()
    for step, length in enumerate((7, 5, 9, 4, 13, 6)):
        x = kit.batch(step, 3, length, 8)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
        reference.load_state_dict(model.state_dict())
        model.zero_grad(), reference.zero_grad()
        kit.backward(compiled.run, x), kit.backward(reference, x)
        assert kit.count_low_rank(model, reference) == 4
        subspaces.add(model.q.weight.grad.subspace)
        optimizer.step()
        states.add(id(optimizer.state[model.q.weight]))
    assert len(compiled.backend.compiled_graphs()) == (1 if marked else 2)
    assert len(subspaces) == len(states) == 1


def test_padding_varies_with_batch_and_length(kit) -> None:
    model = Attention()
    reference = copy.deepcopy(model)
    compiled = kit.compile_eager(model)
    for step, (size, length) in enumerate([(4, 7), (3, 9), (5, 6), (2, 12)]):
        x, lengths = kit.batch(step, size, length, 8), torch.arange(size) % length + 1
        padding = torch.arange(length)[None] < lengths[:, None]
        model.zero_grad(), reference.zero_grad()
        kit.backward(compiled.run, x, padding), kit.backward(reference, x, padding)
        assert kit.count_low_rank(model, reference) == 4
    assert len(compiled.backend.compiled_graphs()) == 2


def test_blocks_compiled_one_by_one_share_code_and_no_basis(kit) -> None:
    compiles = {}
    for name in ("stock", "ours"):
        torch._dynamo.reset()
        model = kit.Net()
        backend = oasis_backend(rank=3, **EAGER)
        graphs: list[object] = []

        def counting(gm, inputs, backend=backend, graphs=graphs, name=name, **kwargs):
            graphs.append(gm)
            if name == "ours":
                return backend(gm, inputs, **kwargs)
            return torch._dynamo.lookup_backend("aot_eager")(gm, inputs, **kwargs)

        for block in model.blocks:
            block.compile(backend=counting)
        for _ in range(2):
            kit.backward(model, kit.batch())
        compiles[name] = len(graphs)
    assert compiles["ours"] == compiles["stock"]
    weights = [layer.weight for block in model.blocks for layer in (block.up, block.down)]
    assert len({weight.grad.subspace for weight in weights}) == 4


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_compiled_block_in_a_compiled_whole(kit, inner_first) -> None:
    model = kit.Net()
    reference = copy.deepcopy(model)
    backend = oasis_backend(rank=3, **EAGER)
    if inner_first:
        model.blocks[0].compile(backend=backend)
    kit.backward(torch.compile(model, backend=backend), kit.batch()), kit.backward(reference, kit.batch())
    assert kit.count_low_rank(model, reference) == 4


def test_a_block_compiled_by_itself_after_the_whole_keeps_its_basis(kit) -> None:
    model = kit.Net()
    reference = copy.deepcopy(model)
    backend = oasis_backend(rank=3, **EAGER)
    kit.backward(torch.compile(model, backend=backend), kit.batch())
    subspace = model.blocks[0].up.weight.grad.subspace
    model.zero_grad()
    kit.backward(torch.compile(model.blocks[0], backend=backend), kit.batch())
    kit.backward(reference.blocks[0], kit.batch())
    assert kit.count_low_rank(model, reference) == 2
    assert model.blocks[0].up.weight.grad.subspace is subspace


def test_a_graph_break_between_two_uses_of_a_weight_over_steps(kit) -> None:
    layer = torch.nn.Linear(8, 8).double()
    reference = copy.deepcopy(layer)

    def twice(layer, x):
        h = torch.tanh(layer(x))
        torch._dynamo.graph_break()
        return layer(h)

    compiled = kit.compile_eager(lambda x: twice(layer, x))
    optimizer = OasisAdamW(layer.parameters(), lr=1e-2)
    for step in range(3):
        reference.load_state_dict(layer.state_dict())
        layer.zero_grad(), reference.zero_grad()
        kit.backward(compiled.run, kit.batch(step)), kit.backward(lambda x: twice(reference, x), kit.batch(step))
        assert kit.count_low_rank(layer, reference) == 1
        h = torch.tanh(layer(kit.batch(step))).detach()
        assert kit.statistic_error(layer.weight, torch.cat([kit.batch(step), h])) < 1e-9
        optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside the compiled region", "around compiled blocks"])
def test_checkpointed_blocks_count_their_activations_once(kit, where, reentrant) -> None:
    def around(block, x):
        return checkpoint(block, x, use_reentrant=reentrant)

    model = kit.Net(around)
    reference = copy.deepcopy(model)
    if where == "inside the compiled region":
        run = kit.compile_eager(model).run
    else:
        backend = oasis_backend(rank=3, **EAGER)
        for block in model.blocks:
            block.compile(backend=backend)
        run = model
    kit.backward(run, kit.batch().requires_grad_()), kit.backward(reference, kit.batch().requires_grad_())
    assert kit.count_low_rank(model, reference) == 4
    assert kit.statistic_error(model.blocks[0].up.weight, kit.batch()) < 1e-9
