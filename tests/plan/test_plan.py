"""The plan against real tensors of small models, and its command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from oasis_fx import OasisAdamW, oasis_backend  # noqa: E402
from oasis_fx.__main__ import main  # noqa: E402
from oasis_fx.inspect.measure import gradient_bytes, optimizer_bytes, saved_for_backward_bytes  # noqa: E402
from oasis_fx.memory.node_costs import saved_storages  # noqa: E402
from oasis_fx.plan import fit, memory, methods  # noqa: E402
from oasis_fx.plan.configs import BUILT_IN, load_config, with_blocks  # noqa: E402
from oasis_fx.plan.memory import KINDS, Phases, States  # noqa: E402
from oasis_fx.plan.methods import Planner, largest_batch  # noqa: E402
from oasis_fx.plan.partitions import Method, Optimizer  # noqa: E402
from oasis_fx.plan.trace import trace_fake  # noqa: E402
from oasis_fx.settings import Settings  # noqa: E402

BLOCKS = 5


def config(blocks: int = BLOCKS):
    return transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=3000,
        use_cache=False,
    )


def planner(**settings) -> Planner:
    return Planner(config(), 2, 32, torch.float32, Settings(rank=8, **settings))


@pytest.fixture(scope="module")
def plain() -> Planner:
    """One for all that only read it: it keeps what it has traced."""
    return planner(memory_budget=0.2)


@pytest.fixture(autouse=True)
def fewer(monkeypatch) -> None:
    for module, name, values in (
        (methods, "STOCK_BUDGETS", (0.3,)),
        (methods, "BUDGETS", (1.0, 0.5)),
        (fit, "SHARES", (1.0, 0.4)),
    ):
        monkeypatch.setattr(module, name, values)


@pytest.mark.slow
def test_states_and_gradients_are_those_of_real_tensors(plain) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config())
    model.compile(backend=oasis_backend(rank=8, inner="aot_eager"))
    optimizer = OasisAdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 300, (2, 32))
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = gradient_bytes(model.parameters())
    optimizer.step()
    states, phases = plain.oasis(1.0)
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    scalars = sum({t.data_ptr(): t.nbytes for t in tensors if t.dim() == 0}.values())
    assert states.weights == sum(p.nbytes for p in model.parameters())
    assert states.optimizer + states.bases == optimizer_bytes(optimizer) - scalars
    bases = {s["basis"].data_ptr(): s["basis"].nbytes for s in optimizer.state.values() if "basis" in s}
    assert states.bases == sum(bases.values())
    assert phases.gradients == pytest.approx(gradients + states.bases, rel=0.01)  # C of each basis is one, too


@pytest.mark.slow
@pytest.mark.parametrize("rewritten", [False, True])
def test_blocks_more_are_as_if_traced(plain, rewritten) -> None:
    optimizer = Optimizer.OASIS if rewritten else Optimizer.ADAMW
    whole = trace_fake(config(), 2, 32, torch.float32, Settings(rank=8))
    forward = whole.trace.forward
    if not rewritten:
        from oasis_fx.plan.trace import halves_under

        saved = saved_storages(halves_under(whole, None, rewritten=False)[0], whole.trace.num_forward_outputs)
    else:
        saved = saved_storages(forward.graph, whole.trace.num_forward_outputs)
    assert plain.partitions.saved(Method(optimizer), 1.0) == pytest.approx(sum(saved.values()), rel=0.03)


def test_what_is_saved_is_what_autograd_keeps(plain) -> None:
    model = transformers.LlamaForCausalLM(config(3))
    backend = oasis_backend(rank=8, inner="aot_eager")
    model.compile(backend=backend)
    tokens = torch.randint(0, 300, (2, 32))
    loss = model(input_ids=tokens, labels=tokens).loss
    known = [
        *model.parameters(),
        *model.buffers(),
        tokens,
        *(t for s in backend._subspaces for t in (s.basis, s.energy)),
    ]
    three = plain.partitions.trace(3, Method())
    counted = sum(saved_storages(three.trace.forward.graph, three.trace.num_forward_outputs).values())
    assert counted == pytest.approx(saved_for_backward_bytes(loss, known), rel=0.05)


@pytest.mark.slow
def test_budgets_and_methods_stand_in_order(plain) -> None:
    found = {row.name: row for row in plain.rows(10**9)}
    totals = {name: row.memory.total for name, row in found.items()}
    assert totals["oasis"] < totals["stock compile, AdamW"]
    assert totals["oasis"] >= totals["oasis, budget 0.5"] >= totals["oasis, budget 0.2"]
    assert totals["8-bit AdamW"] < totals["stock compile, AdamW"]
    assert totals["checkpointing"] < totals["stock compile, AdamW"]
    lora, stock = found["LoRA r=32"].memory.bytes_of, found["stock compile, AdamW"].memory.bytes_of
    assert lora["weights"] > stock["weights"] and lora["optimizer"] < stock["optimizer"]
    for row in found.values():
        assert set(row.memory.bytes_of) == set(KINDS) and min(row.memory.bytes_of.values()) >= 0
        assert row.largest_batch is not None and row.largest_batch > 2


def test_the_largest_batch_is_the_last_that_fits() -> None:
    states = States(weights=100, optimizer=200, bases=0)
    phases = Phases({"activations": 40, "temporaries": 10}, {"activations": 30, "gradients": 50}, 50)
    # 300 are fixed; a sample is 25 in the forward pass, 15 in the backward pass beside 50.
    assert largest_batch(states, phases, 2, 300 + 250) == 10
    assert largest_batch(states, phases, 2, 300 + 249) == 9
    assert largest_batch(states, phases, 2, 300) == 0
    peak = memory.peak(states, phases)
    assert peak.phase == "backward" and peak.total == 380


def test_logits_in_chunks_are_fewer(plain) -> None:
    chunked = dataclasses.replace(plain, chunked=True)
    chunked.partitions = plain.partitions
    assert memory.peak(*chunked.oasis(1.0)).total < memory.peak(*plain.oasis(1.0)).total


def test_nothing_is_allocated() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak, which earlier tests have raised, begins anew
    before = resident("VmRSS")
    large = with_blocks(load_config("Llama-3.1-8B"), 1)
    traced = trace_fake(large, 1, 4096, torch.bfloat16, Settings(rank=128, inner="aot_eager"))
    assert memory.weight_bytes(traced.model) > 2 * 2**30
    assert before < resident("VmHWM") < before + 500 * 1024


def resident(kind: str) -> int:
    """KiB of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_list(name) -> None:
    assert load_config(name.lower()).vocab_size > 30_000


@pytest.mark.slow
def test_the_command(tmp_path, capsys) -> None:
    config().save_pretrained(tmp_path)
    files = {kind: tmp_path / f"plan.{kind}" for kind in ("svg", "png", "json")}
    arguments = ["plan", str(tmp_path), "--batch", "2", "--seq", "32", "--rank", "8", "--fit", "100MiB"]
    assert main([*arguments, "--chart", str(files["svg"]), "--json", str(files["json"])]) == 0
    text = capsys.readouterr().out
    assert "stock compile, AdamW" in text and "largest batch" in text and "memory_budget=1.0" not in text
    assert "MiB at the peak" in text and " gives up nothing" in text
    # matplotlib draws letters as paths, and has the words in comments, where two hyphens may not stand side by side.
    drawn = files["svg"].read_text()
    assert "<svg" in drawn and "<!-- - -fit 100.0 MiB -->" in drawn
    found = json.loads(files["json"].read_text())
    assert all(set(one["bytes"]) == set(KINDS) for one in found["methods"])
    assert found["fits"][0]["lines"][0] == "model = torch.compile(model, backend=oasis_backend(rank=8))"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "model is 'no-such-model', not known here: give one of SmolLM2-135M"),
        (["Qwen3-8B", "--fit", "much"], "--fit is 'much': it must be a size such as '24GiB'"),
        (["Qwen3-8B", "--batch", "0"], "'0': it must be a whole number from 1"),
        (["Qwen3-8B", "--rank", "0"], "rank is 0"),
        (["Qwen3-8B", "--memory-budget", "2"], "memory_budget is 2.0"),
    ],
)
def test_bad_arguments(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
