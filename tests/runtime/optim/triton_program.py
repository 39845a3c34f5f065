"""Run beside Triton by test_triton_kernels.py: `interpret`, with TRITON_INTERPRET=1, and `build`, without."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings

import torch
import triton
import triton.language as tl

from oasis_fx import LowRankGrad, OasisAdamW, OasisLion, OasisMuon, OasisSGD, oasis_backend
from oasis_fx.runtime.optim.adam_updates import AdamWSettings, step_dense_bfloat16
from oasis_fx.runtime.optim.context import Step
from oasis_fx.runtime.optim.kernels import dispatch
from oasis_fx.runtime.optim.kernels.add_products import add_products_
from oasis_fx.runtime.optim.kernels.dense_adamw import step_dense_adamw_
from oasis_fx.runtime.optim.kernels.rounding import SEED_BASE, philox
from oasis_fx.runtime.optim.updates import DenseUpdate, LowRankUpdate


def repair_interpreter() -> None:
    """Make Triton 3.6's interpreter do what a GPU does, where it does not.

    It takes an int of an array of one entry, for the ends of loops, which NumPy 2.4 refuses; it cuts float32 to
    bfloat16 instead of rounding it; and it multiplies the bits of bfloat16 matrices as integers.
    """
    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patched(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def converted(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16) or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    multiply = builder.create_dot
    interpreter._patch_lang_tensor, interpreter._convert_float = patched, converted
    builder.create_dot = lambda self, a, b, *rest: multiply(self, wide(a), wide(b), *rest)


# Of an entry: a rounding, and what the product's operands lose (`tiles`), of alpha |U| |Q|^T.
ROUNDINGS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
RANKS = (1, 4, 32, 33, 128, 512)


def inputs(dtype, m, n, r, turned=False, count=3):
    """Weights, a bank of U, and bases, of which the last two are one."""
    weights = [torch.randn(n, m).to(dtype).T if turned else torch.randn(m, n).to(dtype) for _ in range(count)]
    bases = [torch.randn(n, r) for _ in range(count - 1)]
    return weights, torch.randn(count, m, r), [*bases, bases[-1]]


def products() -> None:
    """Every dtype, layout, rank and gate against float64; sizes that no tile divides; one launch for all weights."""
    settings = {"lr": 0.1, "weight_decay": 1.0, "factor": -1.0}
    gates = itertools.cycle([None, torch.tensor(True), torch.tensor(False)])
    rates = itertools.cycle([0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64), 0.1])
    for dtype, r, turned in itertools.product(ROUNDINGS, RANKS, (False, True)):
        m, n = (70, 150) if r < 100 else (30, 40)
        weights, bank, bases = inputs(dtype, m, n, r, turned)
        gate, old = next(gates), [weight.clone() for weight in weights]
        add_products_(weights, bank, bases, **settings | {"lr": next(rates)}, gate=gate, seed=None)
        for weight, u, basis, before in zip(weights, bank, bases, old, strict=True):
            if gate is not None and not gate:
                assert torch.equal(weight, before)
                continue
            expected = 0.9 * before.double() - 0.1 * u.double() @ basis.double().T
            lost = 1e-6 if dtype == torch.float32 else 1.01 * 2.0**-7  # two factors, each by half a last bit at most
            allowed = ROUNDINGS[dtype] * expected.abs() + lost * 0.1 * u.abs() @ basis.abs().T + 1e-6
            over = ((weight.double() - expected).abs() - allowed).max()
            assert over <= 0, (dtype, r, turned, gate, over, settings)


def views() -> None:
    """Rows within a wider matrix, and addresses that 16 does not divide."""
    whole = torch.randn(40, 101).bfloat16()
    before, u, basis = whole.clone(), torch.randn(40, 8), torch.randn(60, 8)
    bank = u[None]
    add_products_([whole[:, 3:63]], bank, [basis], lr=0.1, weight_decay=0, factor=1, gate=None, seed=None)
    assert torch.equal(whole[:, :3], before[:, :3]) and torch.equal(whole[:, 63:], before[:, 63:])
    error = (whole[:, 3:63].double() - before[:, 3:63].double() - 0.1 * u.double() @ basis.double().T).abs()
    assert (error <= 2.0**-7 * (1 + whole[:, 3:63].double().abs())).all()


def rounding() -> None:
    """Right on average, each weight by noise of its own; exact, infinite and NaN values stay."""
    settings = {"lr": 1.0, "weight_decay": 0.0, "factor": 1.0, "gate": None}
    weight, bank, basis = torch.randn(100, 150).bfloat16(), 1e-3 * torch.randn(1, 100, 4), torch.randn(150, 4)
    bank, basis = bank.bfloat16().float().expand(2, -1, -1).contiguous(), basis.bfloat16().float()
    target, count = weight.double() + bank[0].double() @ basis.double().T, 100
    totals = torch.zeros(2, 100, 150, dtype=torch.float64)
    for seed in range(count):
        rounded = [weight.clone(), weight.clone()]
        add_products_(rounded, bank, [basis, basis], **settings, seed=seed)
        assert not torch.equal(*rounded), "two weights had the same noise"
        totals += torch.stack(rounded)
    mean = totals.mean(0) / count
    up, down = _neighbours(target)
    odds = (target - down) / (up - down)
    deviation = (up - down) * (odds * (1 - odds) / (2 * count)).sqrt()
    z = (mean - target) / deviation.clamp_min(1e-12)
    moved = (odds > 0.02) & (odds < 0.98)
    assert z[moved].abs().max() < 6, z[moved].abs().max()
    assert 0.95 < z[moved].std() < 1.05, z[moved].std()
    assert abs(z[moved].mean()) * moved.sum().sqrt() < 5, "biased"
    special = torch.tensor([[1.0, -2.5, torch.inf, -torch.inf, torch.nan, 0.0]]).bfloat16()
    kept = special.clone()
    for seed in range(20):
        add_products_([kept], torch.zeros(1, 1, 2), [torch.zeros(6, 2)], **settings, seed=seed)
        assert torch.equal(kept.nan_to_num(7), special.nan_to_num(7))
    # A GPU's NaN has all bits set but the sign: noise added to it would carry over into a number.
    bank = torch.full((1, 4, 2), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    for seed in range(20):
        lost = torch.ones(4, 6).bfloat16()
        add_products_([lost], bank, [torch.ones(6, 2)], **settings, seed=seed)
        assert lost.isnan().all()


def _neighbours(values):
    """The bfloat16 numbers above and below, as float64."""
    down = (values.float().view(torch.int32) & -65536).view(torch.float32)
    away = ((values.float().view(torch.int32) & -65536) + 65536).view(torch.float32)
    return torch.maximum(down, away).double(), torch.minimum(down, away).double()


@triton.jit(do_not_specialize=["seed", "stream"])
def philox_kernel(ours, theirs, seed, stream):
    places = tl.arange(0, 64)
    zero = stream * 0
    a, b, c, d = philox(seed, places, stream)
    e, f, g, h = tl.philox(seed, places, stream, zero, zero, 7)
    tl.store(ours + places, (a ^ b ^ c ^ d).to(tl.int32))
    tl.store(theirs + places, (e ^ f ^ g ^ h).to(tl.int32))


def philox_numbers() -> None:
    """Those of Triton's own Philox with as many rounds; all of a counter's bits take part."""
    for seed, stream in ((0, 0), (12345, 7), ((1 << 41) + 3, 2)):
        ours, theirs = torch.zeros(2, 64, dtype=torch.int32)
        philox_kernel[(1,)](ours, theirs, SEED_BASE + seed, stream)
        assert torch.equal(ours, theirs) and len(set(ours.tolist())) == 64


def gates_and_seeds() -> None:
    """A closed gate leaves everything as it is; each weight of a step is rounded by noise of its own."""
    dispatch.DEVICES = ("cpu",)
    settings, weight = AdamWSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, True), torch.randn(40, 30).bfloat16()
    factor, basis = torch.randn(40, 4), torch.randn(30, 4)

    def low_rank(generator, gate) -> torch.Tensor:
        stepped = weight.clone()
        update, given = LowRankUpdate(stepped, factor, basis, (1, 2), {}), {"lr": 1e-3, "weight_decay": 0.1}
        assert dispatch.add_products([update], [factor], [1.0], **given, gate=gate, generator=generator) == []
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
    """Against the same by torch's operators, which differ in their random numbers alone; step counts of their own."""
    given = AdamWSettings(1e-2, 0.9, 0.999, 1e-8, 0.1, True)
    shapes = [((33, 70), (5000,), (1,)), ((32, 48), (4096,))]
    for sizes, rate in zip(shapes, (1e-2, torch.tensor(1e-2)), strict=True):
        columns = [[torch.randn(size).bfloat16() for size in sizes] for _ in range(4)]
        weights, gradients, means, seconds = columns
        gradients, seconds = [g / 100 for g in gradients], [second.abs() for second in seconds]
        counts = [torch.tensor(3.0 + number) for number in range(len(sizes))]
        rows = [[1 - beta ** (float(count) + 1) for beta in (0.9, 0.999)] for count in counts]
        biases, sums = torch.tensor(rows), [[torch.zeros(size) for size in sizes] for _ in range(2)]
        settings = {"lr": rate, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
        for seed in range(60):
            ours = [[tensor.clone() for tensor in column] for column in (weights, means, seconds)]
            step_dense_adamw_(
                ours[0], gradients, *ours[1:], biases, **settings, gate=torch.tensor(True), seed=seed
            )  # fmt: skip
            for place, count in enumerate(counts):
                state = {"step": count.clone(), "exp_avg": means[place].clone(), "exp_avg_sq": seconds[place].clone()}
                plain = weights[place].clone()
                step = Step(given, None, torch.Generator().manual_seed(seed))
                step_dense_bfloat16(plain, gradients[place], state, step)
                pairs = zip((column[place] for column in ours), (plain, *list(state.values())[1:]), strict=True)
                for one, other in pairs:
                    assert ((one.float() - other.float()).abs() <= 2.0**-7 * other.float().abs() + 1e-6).all()
                sums[0][place] += plain.float() / 60
                sums[1][place] += ours[0][place].float() / 60
        assert all((a - b).abs().mean() < 0.002 for a, b in zip(*sums, strict=True))
        shut = [[tensor.clone() for tensor in column] for column in (weights, means, seconds)]
        step_dense_adamw_(shut[0], gradients, *shut[1:], biases, **settings, gate=torch.tensor(False), seed=1)
        for column, before in zip(shut, (weights, means, seconds), strict=True):
            assert all(map(torch.equal, column, before))


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 48)
        self.a, self.c = torch.nn.Linear(48, 80), torch.nn.Linear(48, 80)
        self.norm, self.b = torch.nn.LayerNorm(80), torch.nn.Linear(80, 32)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = self.norm(self.a(x) + self.c(x))
        return torch.nn.functional.cross_entropy(self.b(x).float(), tokens)


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


def replaced(**functions):
    """Kernels of which some are others."""
    made = dispatch._kernels()
    dispatch._kernels = lambda: made._replace(**functions)
    return made


def optimizers() -> None:
    """Whole runs with the kernels and without: the same in float32, and on average in bfloat16."""
    every = (OasisAdamW, OasisSGD, OasisLion, OasisMuon)
    for optimizer, dtype in itertools.product(every, (torch.float32, torch.bfloat16)):
        torch.manual_seed(0)
        model = Net().to(dtype)
        counts: list[int] = []

        def counted(weights, *args, counts=counts, **keywords) -> None:
            counts.append(len(weights))
            add_products_(weights, *args, **keywords)

        real = replaced(add_products=counted)
        losses, ours, made = train(model, ("cpu",), optimizer)
        dispatch._kernels = lambda real=real: real
        assert counts == [2, 1] * 12, (optimizer, counts)
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


def banks() -> None:
    """AdamW's directions are one tensor for each shape; what lies elsewhere is stacked."""
    tensors = [torch.randn(3, 5) for _ in range(3)]
    assert torch.equal(dispatch.as_bank(tensors), torch.stack(tensors))
    parts = list(torch.randn(4, 3, 5))
    bank = dispatch.as_bank(parts[1:])
    assert torch.equal(bank, torch.stack(parts[1:])) and bank.data_ptr() == parts[1].data_ptr()
    assert torch.equal(dispatch.as_bank(parts[::-1]), torch.stack(parts[::-1]))
    real = dispatch._kernels()
    seen: list[torch.Tensor] = []
    replaced(add_products=lambda w, bank, *args, **kw: (seen.append(bank), real.add_products(w, bank, *args, **kw)))
    torch.manual_seed(0)
    train(Net(), ("cpu",), OasisAdamW)
    dispatch._kernels = lambda: real
    assert seen[0].untyped_storage().data_ptr() == seen[1].untyped_storage().data_ptr()


def broken() -> None:
    """A machine that cannot build a kernel goes on without it where it has not run, and says so once."""
    calls: list[int] = []

    def fails_once(*args, **keywords) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        add_products_(*args, **keywords)

    torch.manual_seed(0)
    model = Net()
    real = replaced(add_products=fails_once)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        losses, ours, _ = train(model, ("cpu",), OasisAdamW)
    dispatch._kernels = lambda: real
    assert sum("Triton cannot build" in str(w.message) for w in seen) == 1 and len(calls) == 2
    expected, plain, _ = train(model, (), OasisAdamW)
    assert all(abs(a - b) < 1e-5 * b for a, b in zip(losses, expected, strict=True))
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    repair_interpreter()
    checks = {
        "numbers": (products, views, rounding, philox_numbers, gates_and_seeds, adamw),
        "training": (optimizers, banks, broken),
    }
    for check in checks[sys.argv[1]]:
        check()
        print(check.__name__, "passed", flush=True)
