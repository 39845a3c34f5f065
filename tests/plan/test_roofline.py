"""Predicted times: their arithmetic, what they must keep to, and the command. No time is measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from oasis_fx.__main__ import main  # noqa: E402
from oasis_fx.plan import methods, optimizer_work, roofline  # noqa: E402
from oasis_fx.plan.devices import DEVICES, Device, Shares, find_device  # noqa: E402
from oasis_fx.plan.fusion import kernels_of  # noqa: E402
from oasis_fx.plan.kernels import Kernel, Kind  # noqa: E402
from oasis_fx.plan.methods import STOCK, Planner  # noqa: E402
from oasis_fx.plan.partitions import Method, Optimizer  # noqa: E402
from oasis_fx.plan.trace import halves_under, trace_fake  # noqa: E402
from oasis_fx.settings import Settings  # noqa: E402

HALF = Shares(
    matmul=0.5,
    plain=0.25,
    attention={64: 0.2, 128: 0.4},
    attention_backward={64: 0.1},
    fused=0.5,
    thin=0.25,
    adamw=0.125,
    instructions=0.5,
)
# 100 FLOP/s of bfloat16 matmuls, 40 of the rest, 10 bytes a second.
SLOW = Device("slow", {"bfloat16": 100.0}, 40.0, 10.0, 8.0, HALF, launch=0.0, host_launch=0.0, host_operator=0.0)


def config(blocks: int):
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
        use_cache=False,
    )


@pytest.fixture(scope="module")
def plain() -> Planner:
    """One for all that only read it: it keeps what it has traced."""
    return Planner(config(5), 2, 64, torch.float32, Settings(rank=8))


@pytest.mark.parametrize(
    ("kernel", "seconds"),
    [
        (Kernel("", Kind.MATMUL, torch.bfloat16, 100.0, 1.0), 2.0),  # 100 FLOPs at 50 a second
        (Kernel("", Kind.MATMUL, torch.float32, 100.0, 1.0), 10.0),  # no tensor cores: at 10
        (Kernel("", Kind.MATMUL, torch.bfloat16, 100.0, 10.0), 4.0),  # 10 bytes at 2.5
        (Kernel("", Kind.ATTENTION, torch.bfloat16, 100.0, 1.0, head=128), 2.5),
        (Kernel("", Kind.ATTENTION, torch.bfloat16, 100.0, 1.0, head=96), 5.0),
        (Kernel("", Kind.ATTENTION_BACKWARD, torch.bfloat16, 100.0, 1.0, head=32), 10.0),
        (Kernel("", Kind.FUSED, torch.bfloat16, 100.0, 10.0), 10.0),
        (Kernel("", Kind.FUSED, torch.bfloat16, 1.0, 10.0), 2.0),
        (Kernel("", Kind.ADAMW, torch.bfloat16, 1.0, 10.0), 8.0),
        (Kernel("", Kind.LOW_RANK_WEIGHTS, torch.bfloat16, 1.0, 1.0, instructions=12.0), 3.0),
    ],
)
def test_a_kernel_takes_as_long_as_what_bounds_it(kernel, seconds) -> None:
    assert roofline.kernel_seconds(kernel, SLOW) == pytest.approx(seconds)
    launched = replace(SLOW, launch=0.5)
    assert roofline.kernel_seconds(replace(kernel, launches=4), launched) == pytest.approx(seconds + 2.0)


def test_a_step_is_as_long_as_device_or_host_whichever_is_slower() -> None:
    assert roofline.StepTime(1.0, 2.0, 0.5, 3.0).step == 3.5
    assert roofline.StepTime(1.0, 2.0, 0.5, 4.0).step == 4.0


def test_the_work_of_adamw() -> None:
    parameters = [torch.empty(30, 10, dtype=torch.bfloat16), torch.empty(7), torch.empty(5)]
    found = {kernel.dtype: kernel for kernel in optimizer_work.adamw_work(parameters)}
    assert found[torch.bfloat16].num_bytes == 7 * 2 * 300 and found[torch.float32].num_bytes == 7 * 4 * 12


def test_the_work_of_our_step() -> None:
    weights = [(16, 24, 4, torch.bfloat16), (48, 24, 4, torch.bfloat16)]
    *steps, states, products = optimizer_work.low_rank_work(weights, [(24, 4)])
    assert [kernel.num_bytes for kernel in steps] == [2 * 2 * 16 * 24, 2 * 2 * 48 * 24]
    assert [kernel.flops for kernel in steps] == [2 * 16 * 24 * 4, 2 * 48 * 24 * 4]
    assert steps[0].instructions == pytest.approx(16 * 24 * optimizer_work.instructions_of(4))
    assert products.flops == 2 * (3 * 64 + 6 * 24) * 16
    assert states.num_bytes == 4 * 4 * (47 * 64 + 43 * 24)
    assert optimizer_work.instructions_of(128) == pytest.approx(19.5)


def test_the_work_of_tails() -> None:
    """One basis of 24 x 4 with a tail of 2, under weights of 10 and 6 rows."""
    *steps, passes, products = optimizer_work.tail_work([(24, 4, 2, [(10, torch.float32), (6, torch.bfloat16)])])
    assert [step.flops for step in steps] == [2 * 10 * 24 * 2, 2 * 6 * 24 * 2]
    assert [step.num_bytes for step in steps] == [0, 0]
    assert passes.num_bytes == 4 * (13 * 16 * 2 + 6 * 16 * 4 + 34 * 24 * 2 + 12 * 24 * 4)
    assert products.flops == 2 * 24 * 2 * (6 * 4 + 5 * 2)


@pytest.mark.slow
def test_a_tail_adds_to_a_step_and_to_nothing_that_is_dense() -> None:
    plain, tailed = (
        optimizer_work.oasis_work(trace_fake(config(2), 2, 64, torch.float32, Settings(rank=8, tail=tail)))
        for tail in (None, 8)
    )
    assert tailed[: len(plain)] == plain
    assert sum(kernel.num_bytes for kernel in tailed[len(plain) :]) > 0


@pytest.mark.slow
def test_rewritten_weights_and_all_others_are_all_weights(plain) -> None:
    traced = plain.partitions.trace(3, Method())
    work = optimizer_work.oasis_work(traced)
    dense = sum(kernel.num_bytes for kernel in work if kernel.kind is Kind.ADAMW) / (7 * 4)
    low_rank = sum(kernel.num_bytes for kernel in work if kernel.kind is Kind.LOW_RANK_WEIGHTS) / (2 * 4)
    assert dense + low_rank == sum(p.numel() for p in traced.model.parameters())
    assert low_rank == 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [Optimizer.ADAMW, Optimizer.OASIS])
def test_blocks_more_are_as_if_traced(plain, optimizer) -> None:
    device = replace(SLOW, launch=1.0)
    found = plain.time(Method(optimizer), device)
    whole = trace_fake(config(5), 2, 64, torch.float32, Settings(rank=8))
    for graph, part in zip(
        halves_under(whole, None, rewritten=optimizer is Optimizer.OASIS), (found.forward, found.backward), strict=True
    ):
        taken = sum(roofline.kernel_seconds(kernel, device) for kernel in kernels_of(graph))
        assert part == pytest.approx(taken, rel=0.02)  # the first and the last block differ a little


@pytest.mark.slow
def test_checkpointing_runs_every_block_twice(plain) -> None:
    """Its attention is wrapped in an operator that keeps the state of the generator, and counts all the same."""
    (ahead, back), (once, again) = (
        [attention_flops(graph) for graph in plain.partitions.graphs(method)]
        for method in (Method(), Method(checkpointed=True))
    )
    assert ahead[Kind.ATTENTION] == once[Kind.ATTENTION] == again[Kind.ATTENTION] > 0
    assert back[Kind.ATTENTION] == 0 and back[Kind.ATTENTION_BACKWARD] == again[Kind.ATTENTION_BACKWARD] > 0
    dtypes = {kernel.dtype for kernel in kernels_of(plain.partitions.graphs(Method(checkpointed=True))[1])}
    assert torch.uint8 not in dtypes


def attention_flops(graph) -> dict[Kind, float]:
    kinds = (Kind.ATTENTION, Kind.ATTENTION_BACKWARD)
    return {kind: sum(kernel.flops for kernel in kernels_of(graph) if kernel.kind is kind) for kind in kinds}


@pytest.mark.slow
def test_every_row_has_a_time_and_more_recomputation_never_takes_less(plain) -> None:
    for device in DEVICES:
        found = {row.name: row.time for row in plain.rows(device=device)}
        assert all(time is not None and 0 < time.step < 100 for time in found.values())
    steps = {row.name: row.time.step for row in plain.rows(device=SLOW)}
    assert steps["checkpointing"] > steps[STOCK]
    assert steps["oasis"] < steps[STOCK]
    ours = [steps[name] for name in ("oasis", "oasis, budget 0.5", "oasis, budget 0.3", "oasis, budget 0.1")]
    stocks = [steps[name] for name in (STOCK, "stock, budget 0.5", "stock, budget 0.3", "stock, budget 0.1")]
    assert ours == sorted(ours) and stocks == sorted(stocks) and ours[0] < ours[-1] and stocks[0] < stocks[-1]


@pytest.mark.slow
def test_a_device_of_twice_the_rates_takes_half_the_time(plain) -> None:
    twice = replace(
        SLOW,
        matmul_flops={name: 2 * rate for name, rate in SLOW.matmul_flops.items()},
        flops=2 * SLOW.flops,
        bandwidth=2 * SLOW.bandwidth,
        instructions=2 * SLOW.instructions,
    )
    for method in plain.methods().values():
        slow, fast = (plain.time(method, device) for device in (SLOW, twice))
        for part in ("forward", "backward", "optimizer", "step"):
            assert getattr(slow, part) == pytest.approx(2 * getattr(fast, part))


@pytest.mark.slow
def test_launches_keep_the_host_busy(plain) -> None:
    patient = replace(SLOW, host_launch=1e6)
    found, usual = plain.time(Method(), patient), plain.time(Method(), SLOW)
    assert usual.host == 0.0 and usual.step < found.host == found.step
    assert plain.time(Method(), replace(patient, parallel=False)).step == usual.step


def test_an_unknown_device() -> None:
    assert find_device("h100").name == "H100"
    with pytest.raises(ValueError, match=r"device is 'H300': it must be one of H100, H200, A100, RTX-4090, L4, cpu"):
        find_device("H300")


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(methods, "STOCK_BUDGETS", ())
    monkeypatch.setattr(methods, "BUDGETS", (1.0,))
    config(4).save_pretrained(tmp_path)
    file = tmp_path / "plan.json"
    arguments = ["plan", str(tmp_path), "--batch", "2", "--seq", "32", "--rank", "8", "--json", str(file)]
    assert main([*arguments, "--time", "rtx-4090", "--blocks", "2", "--vocabulary", "100"]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}, 2 blocks, vocabulary 100, bfloat16, 2 x 32 tokens, rank 8, full loss" in text
    assert "predicted, not measured: ms of a step on RTX-4090" in text and text.count("checkpointing") == 3
    found = json.loads(file.read_text())
    assert found["device"] == "RTX-4090" and found["methods"][0]["predicted_ratio"] == 1.0
    for one in found["methods"]:
        times = one["predicted_seconds"]
        parts = times["forward"] + times["backward"] + times["optimizer"]
        assert times["step"] == max(parts, times["host"]) > 0
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 64) + 2 * 100 * 64 + 64
    assert found["methods"][0]["bytes"]["weights"] == 2 * weights


def test_the_command_names_devices(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "Qwen3-8B", "--time", "TPU"])
    assert stop.value.code == 2 and "device is 'TPU': it must be one of H100" in capsys.readouterr().err
