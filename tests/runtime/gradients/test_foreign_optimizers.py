"""Optimizers that are not ours step low-rank gradients as they step the dense ones."""

from __future__ import annotations

import pytest
import torch

from oasis_fx.runtime.subspaces.basis_updates import update_bases
from oasis_fx.runtime.subspaces.spec import SubspaceSpec
from oasis_fx.runtime.subspaces.store import STORE

pytestmark = pytest.mark.filterwarnings("ignore::oasis_fx.LowRankGradWarning", "ignore::oasis_fx.OasisWarning")
SPEC = SubspaceSpec(16)


def bitsandbytes(name, **settings):
    def make(parameters):
        return getattr(pytest.importorskip("bitsandbytes").optim, name)(parameters, **settings)

    return make


def torchao(name, **settings):
    def make(parameters):
        return getattr(pytest.importorskip("torchao.optim"), name)(parameters, **settings)

    return make


def stock(name, **settings):
    return lambda parameters: getattr(torch.optim, name)(parameters, **settings)


OPTIMIZERS = {
    "AdamW": stock("AdamW", lr=0.01),
    "AdamW, one at a time": stock("AdamW", lr=0.01, foreach=False),
    "AdamW, foreach": stock("AdamW", lr=0.01, foreach=True, amsgrad=True),
    "AdamW, fused": stock("AdamW", lr=0.01, fused=True),
    "SGD, momentum": stock("SGD", lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "SGD, momentum, foreach": stock("SGD", lr=0.01, momentum=0.9, foreach=True),
    "SGD, maximize": stock("SGD", lr=0.01, momentum=0.9, maximize=True),
    "Adafactor": stock("Adafactor", lr=0.01),
    "Adagrad": stock("Adagrad", lr=0.01),
    "Rprop": stock("Rprop", lr=0.01),
    "RMSprop": stock("RMSprop", lr=0.01, momentum=0.5, centered=True),
    "NAdam": stock("NAdam", lr=0.01),
    "Muon": stock("Muon", lr=0.01),
    "bitsandbytes AdamW8bit": bitsandbytes("AdamW8bit", lr=0.01, min_8bit_size=1),
    "bitsandbytes Lion": bitsandbytes("Lion", lr=0.01),
    "torchao AdamW8bit": torchao("AdamW8bit", lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_foreign_optimizer_steps_as_on_dense_gradients(name, products, make_weight) -> None:
    w = make_weight(64, 64, dtype=torch.float32)
    reference = torch.nn.Parameter(w.detach().clone())
    ours, theirs = (OPTIMIZERS[name]([p]) for p in (w, reference))
    for step in range(3):
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(step))
        (y,) = products(x, [w], SPEC)
        y.square().mean().backward()
        reference.grad = w.grad.to_dense().clone()
        before = STORE.existing(w, SPEC).basis.clone()
        ours.step(), theirs.step()
        update_bases([w])
        assert not torch.equal(STORE.existing(w, SPEC).basis, before)
        ours.zero_grad(), theirs.zero_grad()
    torch.testing.assert_close(w, reference)
    for kept in ours.state[w].values():
        assert type(kept).__module__.split(".")[0] != "oasis_fx"
