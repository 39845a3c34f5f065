"""Real architectures: every linear weight gradient is found or the report says why not, and all of them are right."""

from __future__ import annotations

import re
import sys
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from matrix import compare, reasons_for_dense, table_row
from zoo import DEFAULT_RANK, Entry, load_all

from oasis_fx import LowRankGrad
from oasis_fx.graph.matricization import as_rows

PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
PACKAGES = ("torch", "transformers", "timm", "diffusers", "peft", "torchao")
DEFAULTS = ("output head, excluded by default", "embedding, or tied to one, excluded by default")


def versions() -> str:
    """What the page was made with: another release may build its models in another way."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    return ", ".join(found)


def page() -> list[str]:
    return PAGE.read_text().splitlines() if PAGE.is_file() else []


def assert_right(entry: Entry, name: str, found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    if not isinstance(found, LowRankGrad):
        assert (found is None) == (expected is None), name
        assert found is None or torch.equal(found, expected), name
        return
    assert expected is not None
    q = found.basis.detach()
    projected = as_rows(expected, found.features).to(q.dtype) @ q
    error = (found.factor.to(q.dtype) - projected).abs().max()
    assert error <= entry.tolerance * projected.abs().max(), f"{name}: {error}"


# Those that take longest; and of those that are alike one is enough.
LARGE = (
    "UNet of diffusers", "Gemma 3", "T5 (encoder-decoder, tied embedding)", "Whisper", "Mamba-2", "CLIP",
    "DeepSeek-V3 (MLA, experts)", "Mixtral (3-D experts, float64)", "Qwen3-MoE",
    "LoRA of peft on Llama quantised by torchao (int8)", "LoRA of peft on Llama", "Mixtral (3-D experts, bfloat16)",
    "Qwen3", "Phi-3 (fused qkv and gate_up)", "ConvNeXt of timm (depthwise and patch convolutions)",
    "nn.TransformerDecoder",
)  # fmt: skip

RUNS = [
    *(
        pytest.param(
            entry,
            "aot_eager",
            id=f"{entry.name}-aot_eager",
            marks=[pytest.mark.slow] if entry.alike or entry.name in LARGE else [],
        )
        for entry in load_all()
    ),
    *(
        pytest.param(entry, "inductor", id=f"{entry.name}-inductor", marks=pytest.mark.slow)
        for entry in load_all()
        if not entry.alike
    ),
]


@pytest.mark.parametrize(("entry", "inner"), RUNS)
def test_model(entry: Entry, inner: str) -> None:
    expected, found, backend, model = compare(entry, inner)
    assert len(found.outputs) == len(expected.outputs) > 0
    assert all(torch.equal(one, other) for one, other in zip(found.outputs, expected.outputs, strict=True))
    for name, gradient in found.gradients.items():
        assert_right(entry, name, gradient, expected.gradients[name])
    assert (found.num_graphs, found.num_breaks) == (expected.num_graphs, expected.num_breaks)
    for name, reason in reasons_for_dense(model, backend).items():
        assert reason in DEFAULTS or any(fnmatchcase(name, glob) for glob in entry.left), f"{name}: {reason}"
    if inner == "aot_eager" and f"Made with {versions()}." in page():
        assert table_row(entry, model, backend) in page(), "docs/coverage.md is out of date: run `make coverage`"


def test_the_page_has_the_models_of_the_zoo() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page() if line.startswith("| ")]
    assert rows[1:] == [entry.name for entry in load_all()]  # behind the head


def test_the_page_was_made_with_what_make_setup_installs() -> None:
    """Otherwise its rows are compared with nothing."""
    makefile = (PAGE.parents[1] / "Makefile").read_text()
    pins = dict(re.findall(r"(?<![\w-])(\w+)==([\d.]+)", makefile))
    (made,) = re.findall(r"^Made with (.*)\.$", PAGE.read_text(), re.MULTILINE)
    assert dict(entry.split() for entry in made.split(", ")) == {name: pins[name] for name in PACKAGES}


TEXT = """\
# Coverage

What becomes of the weights of real architectures: tiny random models, built offline, trained for two steps by the
backend (rank {rank}) and by its inner compiler alone. Forward passes are bitwise equal, low-rank gradients are
`dW @ Q`, all others bitwise equal, and there are no more graphs and graph breaks than without us:
`tests/coverage/test_coverage.py` checks it, and compares this page with what the code does. `make coverage` writes it.

Made with {versions}.

| model | weights | low-rank gradient | dense gradient, and why |
|---|---|---|---|
{rows}

Weights are the trainable parameters of two or more dimensions, tables of embeddings and positions among them.
Convolutions without groups count as matmuls of their patches. The experts of a layer share a basis.
"""


def write_page() -> None:
    """`make coverage`."""
    rows = []
    for entry in load_all():
        _, _, backend, model = compare(entry, "aot_eager")
        rows.append(table_row(entry, model, backend))
        print(rows[-1], flush=True)
    PAGE.write_text(TEXT.format(rank=DEFAULT_RANK, versions=versions(), rows="\n".join(rows)))


if __name__ == "__main__":
    write_page()
