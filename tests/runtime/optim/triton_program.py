"""Run beside Triton by test_triton_kernels.py: `interpret`, with TRITON_INTERPRET=1, and `build`, without."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings

import torch

from oasis_fx import LowRankGrad, OasisAdamW, OasisLion, oasis_backend
from oasis_fx.runtime.optim.adam_updates import AdamWSettings, step_dense_bfloat16
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.kernels import dispatch, triton_kernels
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}


def products() -> None:
    """Every dtype, layout and gate; sizes that no block divides, a rank of several parts."""
    sizes = [(70, 130, 5), (64, 64, 32), (3, 200, 40)]
    gates = [None, torch.tensor(True), torch.tensor(False)]
    for dtype, (m, n, r), turned, gate in itertools.product(TOLERANCES, sizes, (False, True), gates):
        weight = torch.randn(n, m).to(dtype).T if turned else torch.randn(m, n).to(dtype)
        u, basis, old = torch.randn(m, r), torch.randn(n, r), weight.clone()
        triton_kernels.add_product_(weight, u, basis, keep=0.9, alpha=-0.1, gate=gate, seed=None)
        expected = old if gate is not None and not gate else (0.9 * old.float() - 0.1 * u @ basis.T).to(dtype)
        error = (weight.float() - expected.float()).abs().max()
        assert error <= TOLERANCES[dtype], (dtype, m, n, r, turned, gate, error)


def rounding() -> None:
    """Right on average; exact, infinite and NaN values stay."""
    weight, u, basis = torch.randn(200, 150).bfloat16(), 1e-3 * torch.randn(200, 4), torch.randn(150, 4)
    target, total, count = weight.float() + u @ basis.T, torch.zeros(200, 150), 40
    for seed in range(count):
        rounded = weight.clone()
        triton_kernels.add_product_(rounded, u, basis, keep=1.0, alpha=1.0, gate=None, seed=seed)
        assert (rounded.float() - target).abs().max() <= 2.0**-7 * target.abs().max()
        total += rounded.float()
    nearest = (weight.float() - target).abs().mean()
    assert (total / count - target).abs().mean() < 0.2 * nearest
    assert abs((total / count - target).mean()) < 0.01 * nearest
    special = torch.tensor([[1.0, -2.5, torch.inf, -torch.inf, torch.nan, 0.0]]).bfloat16()
    kept = special.clone()
    for seed in range(20):
        triton_kernels.add_product_(kept, torch.zeros(1, 2), torch.zeros(6, 2), keep=1, alpha=1, gate=None, seed=seed)
        assert torch.equal(kept.nan_to_num(7), special.nan_to_num(7))
    # An H100's NaN has all bits set: noise added to it would carry over into a number.
    u = torch.full((4, 2), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    for seed in range(20):
        lost = torch.ones(4, 6).bfloat16()
        triton_kernels.add_product_(lost, u, torch.ones(6, 2), keep=1.0, alpha=1.0, gate=None, seed=seed)
        assert lost.isnan().all()


def gates_and_seeds() -> None:
    """A closed gate leaves everything as it is; each weight of a step is rounded by noise of its own."""
    dispatch.DEVICES = ("cpu",)
    settings, weight = AdamWSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, True), torch.randn(40, 30).bfloat16()
    factor, basis = torch.randn(40, 4), torch.randn(30, 4)

    def low_rank(generator, gate) -> torch.Tensor:
        stepped = weight.clone()
        update = LowRankUpdate(stepped, factor, basis, (1, 2), {})
        assert dispatch.add_product(update, factor, 0.9, 1e-3, gate, generator)
        return stepped

    def dense(generator, gate) -> list[torch.Tensor]:
        state = {"step": torch.tensor(3.0), "exp_avg": weight.clone(), "exp_avg_sq": weight.abs()}
        update = DenseUpdate(weight.clone(), weight / 10, state)
        assert dispatch.step_dense_bfloat16([update], Step(settings, gate, generator)) == []
        return [update.weight, *state.values()]

    shut, opened = torch.tensor(False), torch.tensor(True)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(low_rank(generator, shut), weight)
    assert all(map(torch.equal, dense(generator, shut), [weight, torch.tensor(3.0), weight, weight.abs()]))
    for step in (low_rank, lambda *given: dense(*given)[0]):
        generator = torch.Generator().manual_seed(1)
        first, second = step(generator, opened), step(generator, opened)
        assert not torch.equal(first, second) and not torch.equal(first, weight)
        assert torch.equal(first, step(torch.Generator().manual_seed(1), opened))


def adamw() -> None:
    """Against the same by torch's operators, which differ in their random numbers alone."""
    weight, gradient, mean, second = (torch.randn(33, 70).bfloat16() for _ in range(4))
    gradient, second, given = gradient / 100, second.abs(), AdamWSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, True)
    biases, sums = torch.tensor([1 - 0.9**4, 1 - 0.999**4]), [torch.zeros(33, 70), torch.zeros(33, 70)]
    for seed in range(60):
        state = {"step": torch.tensor(3.0), "exp_avg": mean.clone(), "exp_avg_sq": second.clone()}
        plain = weight.clone()
        step_dense_bfloat16(plain, gradient, state, Step(given, None, torch.Generator().manual_seed(seed)))
        ours = [weight.clone(), mean.clone(), second.clone()]
        settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
        triton_kernels.step_adamw_(ours[0], gradient, *ours[1:], biases, **settings, gate=torch.tensor(True), seed=seed)
        for one, other in zip(ours, (plain, state["exp_avg"], state["exp_avg_sq"]), strict=True):
            assert ((one.float() - other.float()).abs() <= 2.0**-7 * other.float().abs() + 1e-6).all()
        for total, found in zip(sums, (plain, ours[0]), strict=True):
            total += found.float() / 60
    assert (sums[0] - sums[1]).abs().mean() < 0.002
    shut = [weight.clone(), mean.clone(), second.clone()]
    triton_kernels.step_adamw_(shut[0], gradient, *shut[1:], biases, **settings, gate=torch.tensor(False), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(shut, (weight, mean, second), strict=True))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 48)
        self.a, self.norm, self.b = torch.nn.Linear(48, 80), torch.nn.LayerNorm(80), torch.nn.Linear(80, 32)

    def forward(self, tokens):
        return torch.nn.functional.cross_entropy(self.b(self.norm(self.a(self.embed(tokens)))).float(), tokens)


def train(model, devices, optimizer, **options) -> tuple[list[float], torch.nn.Module, object]:
    torch._dynamo.reset()
    dispatch.DEVICES = devices
    model = copy.deepcopy(model)
    compiled = torch.compile(model, backend=oasis_backend(8, inner="aot_eager"))
    made, losses = optimizer(model.parameters(), lr=3e-3, weight_decay=0.1, **options), []
    for step in range(12):
        tokens = torch.randint(32, (64,), generator=torch.Generator().manual_seed(step))
        loss = compiled(tokens)
        loss.backward()
        # torch's own fused AdamW, which takes the other float32 weights, does not count.
        ours = [p for p in model.parameters() if isinstance(p.grad, LowRankGrad) or p.dtype == torch.bfloat16]
        versions = {p: p._version for p in ours}
        made.step()
        assert all(p._version > v for p, v in versions.items()), "autograd was not told"
        made.zero_grad()
        losses.append(loss.item())
    return losses, model, made


def optimizers() -> None:
    """Whole runs with the kernels and without: the same in float32, and on average in bfloat16."""
    for optimizer, dtype in itertools.product((OasisAdamW, OasisLion), (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        model = Net().to(dtype)
        calls: list[object] = []
        real = triton_kernels.add_product_
        triton_kernels.add_product_ = lambda *args, real=real, calls=calls, **kw: (calls.append(1), real(*args, **kw))
        losses, ours, made = train(model, ("cpu",), optimizer)
        triton_kernels.add_product_ = real
        assert len(calls) == 12 * 2, (optimizer, len(calls))
        expected, plain, _ = train(model, (), optimizer)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        assert all(abs(a - b) < tolerance * b for a, b in zip(losses, expected, strict=True)), (losses, expected)
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            if p.dim() < 2 and dtype == torch.bfloat16:
                continue  # a bias that began at zero is all noise
            error = (p - q).float().norm() / q.float().norm().clamp_min(1e-3)
            assert error < tolerance, (optimizer, dtype, p.shape, error)
        again, _, _ = train(model, ("cpu",), optimizer)
        assert again == losses, "the same seeds gave another run"
        assert all(int(s["step"]) == 12 for s in made.state.values() if "step" in s)


def broken() -> None:
    """A machine that cannot build kernels goes on without them, and says so once."""
    real = triton_kernels.add_product_
    triton_kernels.add_product_ = lambda *_, **__: 1 / 0
    torch.manual_seed(0)
    model = Net()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        losses, _, _ = train(model, ("cpu",), OasisAdamW)
    triton_kernels.add_product_ = real
    assert sum("Triton cannot build" in str(w.message) for w in seen) == 1
    assert losses == train(model, (), OasisAdamW)[0]


def build() -> None:
    """Machine code for two kinds of GPU, which need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = dict.fromkeys(("keep", "alpha", "lr", "beta1", "beta2", "eps"), "fp32")
    product = {"u": "*fp32", "basis": "*fp32", "m": "i32", "n": "i32", "stride_m": "i32", "stride_n": "i32"}
    signature = product | numbers | {"rank": "i32", "seed": "i64", "gate": "*i1", "biases": "*fp32", "count": "i32"}
    signature |= dict.fromkeys(("gradient", "mean", "second"), "*bf16")
    blocks = {"ROWS": 64, "COLUMNS": 64, "PARTS": 2, "PART": 32}
    for capability, gated in itertools.product((80, 90), (True, False)):
        for weight in ("*bf16", "*fp16", "*fp32"):
            constants = {"GATED": gated, "ROUND": weight == "*bf16", **blocks}
            _build(triton, ASTSource, triton_kernels.add_product_kernel, signature | {"weight": weight}, constants,
                   GPUTarget("cuda", capability, 32))  # fmt: skip
        _build(triton, ASTSource, triton_kernels.adamw_kernel, signature | {"weight": "*bf16"},
               {"GATED": gated, "BLOCK": 1024}, GPUTarget("cuda", capability, 32))  # fmt: skip


def _build(triton, source, kernel, types, constants, target) -> None:
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    made = triton.compile(source(kernel, signature, constexprs=constants), target=target)
    assert len(made.asm["cubin"]) > 1000


if __name__ == "__main__":
    torch.manual_seed(0)
    interpreted = (products, rounding, gates_and_seeds, adamw, optimizers, broken)
    for check in interpreted if sys.argv[1] == "interpret" else (build,):
        check()
        print(check.__name__, "passed", flush=True)
