"""What only a CUDA device shows. Not run by `make test`."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

from oasis_fx import LowRankGrad, LowRankGradWarning, OasisAdamW, oasis_backend
from oasis_fx.runtime.subspaces.rules import Oja

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def llama(dtype=torch.float32, hidden=128, layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        vocab_size=256,
        use_cache=False,
    )
    return LlamaForCausalLM(config).cuda().to(dtype), torch.randint(0, 256, (4, 64), device="cuda")


def one_pass(model, x, backend, **keywords):
    torch._dynamo.reset()
    out = torch.compile(model, backend=backend, **keywords)(input_ids=x, labels=x)
    out.loss.backward()
    return out.logits.detach()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_to_the_inner_compiler_alone(dtype, inner) -> None:
    model, x = llama(dtype)
    reference = copy.deepcopy(model)
    expected = one_pass(reference, x, inner)
    found = one_pass(model, x, oasis_backend(rank=16, inner=inner))
    if inner == "aot_eager":
        assert torch.equal(found, expected)
    else:  # Inductor fuses operations otherwise where a graph has other outputs
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 if dtype == torch.float32 else 1e-2)
    rewritten = 0
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        if isinstance(p.grad, LowRankGrad):
            rewritten += 1
            projected = q.grad.float() @ p.grad.basis.detach()
            error = (p.grad.factor.float() - projected).norm() / projected.norm()
            assert error < (1e-5 if dtype == torch.float32 else 3e-2), name
            assert p.grad.subspace.statistic.isfinite().all()
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5 if dtype == torch.float32 else 1e-2)
    assert rewritten == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_training_stays_orthonormal_finite_and_low_rank(dtype, precision) -> None:
    model, x = llama(dtype)
    compiled = torch.compile(model, backend=oasis_backend(rank=16))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)
    torch.set_float32_matmul_precision(precision)
    losses = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", LowRankGradWarning)
            for _ in range(30):
                loss = compiled(input_ids=x, labels=x).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert losses[-1] < 0.7 * losses[0]
    bases = {s["basis"].data_ptr(): s["basis"] for s in optimizer.state.values() if "basis" in s}
    assert len(bases) == 2 * 4
    for q in bases.values():
        q = q.double()
        assert (q.T @ q - torch.eye(16, device="cuda")).abs().max() < 1e-5
    assert optimizer.num_skipped_steps == 0


def test_a_non_finite_step_is_left_out_without_waiting() -> None:
    model, x = llama()
    compiled = torch.compile(model, backend=oasis_backend(rank=16, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)
    compiled(input_ids=x, labels=x).loss.backward()
    optimizer.step(), optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [p.detach().clone() for p in model.parameters()]
    (compiled(input_ids=x, labels=x).loss * math.inf).backward()
    optimizer.step(), optimizer.zero_grad()
    assert optimizer.num_skipped_steps == 1
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[key][k]) for k, v in entry.items() if isinstance(v, torch.Tensor))


def test_autocast_and_grad_scaler() -> None:
    model, x = llama()
    compiled = torch.compile(model, backend=oasis_backend(rank=16))
    optimizer, scaler = OasisAdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = compiled(input_ids=x, labels=x).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode) -> None:
    model, x = llama()
    reference = copy.deepcopy(model)
    eager, plain = OasisAdamW(model.parameters(), lr=1e-3), OasisAdamW(reference.parameters(), lr=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=oasis_backend(rank=16), mode=mode)
    expected = torch.compile(reference, backend=oasis_backend(rank=16, inner="aot_eager"))
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        loss, reference_loss = compiled(input_ids=x, labels=x).loss, expected(input_ids=x, labels=x).loss
        loss.backward(), reference_loss.backward()
        torch.testing.assert_close(loss, reference_loss, rtol=1e-3, atol=1e-3)
        for optimizer in (eager, plain):
            optimizer.step(), optimizer.zero_grad()


@pytest.mark.parametrize("every", [1, 3])
def test_cuda_graphs_see_bases_that_move(every) -> None:
    """Bases move by copies in place; a graph that had kept old values would give old coordinates. Two micro-batches a
    step: the second replay must not overwrite what the first one has left in gradients and statistics."""
    model, x = llama()
    reference = copy.deepcopy(model)
    optimizer, plain = OasisAdamW(model.parameters(), lr=1e-3), OasisAdamW(reference.parameters(), lr=1e-3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = oasis_backend(rank=16, subspace=Oja(every=every))
    compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
    expected = torch.compile(reference, backend=oasis_backend(rank=16, subspace=Oja(every=every)))
    addresses = set()
    for _ in range(8):
        for micro in x.chunk(2):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(input_ids=micro, labels=micro).loss.backward()
            expected(input_ids=micro, labels=micro).loss.backward()
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            if isinstance(p.grad, LowRankGrad):
                torch.testing.assert_close(p.grad.factor, q.grad.factor, rtol=1e-2, atol=1e-4, msg=name)
                torch.testing.assert_close(p.grad.basis, q.grad.basis, rtol=1e-2, atol=1e-3, msg=name)
        bases = {p.grad.basis.data_ptr() for p in model.parameters() if isinstance(p.grad, LowRankGrad)}
        addresses.add(frozenset(bases))
        for each in (optimizer, plain):
            each.step(), each.zero_grad()
    assert len(addresses) == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
