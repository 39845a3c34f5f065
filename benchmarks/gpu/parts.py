"""The parts of the GPU run, each a command, most telling first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Command = Callable[[Path, str, bool], list[str]]

# Exact ways of stock's to need less memory, then ours; the first of each group is what the others are compared with.
CONTENDERS = "stock,oasis,oasis-budget0.3,oasis-budget0.1,stock-recompute,checkpoint,lora128"


@dataclass(frozen=True)
class Part:
    """One part of the run.

    Attributes:
        name: of the part, and of the file that it writes.
        seconds: after which it is cut off.
        command: arguments of Python, from the folder for results, the device, and whether sizes are to be small.
        environment: variables of the part.
    """

    name: str
    seconds: float
    command: Command
    environment: Mapping[str, str] = field(default_factory=dict)


def _module(name: str) -> Command:
    def command(out: Path, device: str, tiny: bool) -> list[str]:
        return ["-m", f"benchmarks.gpu.{name}", "--out", str(out), "--device", device, *(["--tiny"] if tiny else [])]

    return command


def _steps(model: str, layers: int, batch: int, seq: int, options: list[str]) -> Command:
    """Whole steps of every contender; ``tiny`` takes two of them and a model of two blocks."""

    def command(out: Path, device: str, tiny: bool) -> list[str]:
        if tiny:
            sizes = ["--model", "64x2", "--batch", "2", "--seq", "32", "--rank", "8", "--contenders", "stock,oasis",
                     "--steps", "2"]  # fmt: skip
        else:
            sizes = ["--model", model, "--layers", str(layers), "--batch", str(batch), "--seq", str(seq),
                     "--rank", "128", "--contenders", CONTENDERS, "--together", "4", "--steps", "4",
                     *options]  # fmt: skip
        return ["-m", "benchmarks.run", "--out", str(out), "--device", device, "--dtype", "bfloat16", *sizes]

    return command


def _tests(out: Path, device: str, tiny: bool) -> list[str]:
    # A process each: they compile on the CPU for most of their time. Where there is no GPU all are skipped.
    return ["-m", "pytest", "tests/test_gpu.py", "-q", "-p", "no:cacheprovider", "-n", "1" if tiny else "14",
            "--tb", "short", "-p", "benchmarks.gpu.report_at_once"]  # fmt: skip


def _profile(out: Path, device: str, tiny: bool) -> list[str]:
    sizes = ["--model", "64x2", "--batch", "2", "--seq", "32", "--rank", "8"] if tiny else [
        "--model", "llama-8b", "--layers", "4", "--vocabulary", "1024", "--batch", "8", "--seq", "2048", "--rank", "128"
    ]  # fmt: skip
    return ["-m", "benchmarks.profile_step", "--device", device, "--out", str(out / "profile.txt"), *sizes]


# The blocks of an 8B Llama without its vocabulary are what the backend rewrites, in the proportions of 32 blocks.
_NO_VOCABULARY = ["--vocabulary", "1024"]

PARTS = (
    Part("kernels", 60, _module("kernels")),
    Part("optimizer_step", 100, _module("optimizer_step")),
    Part("steps_8b", 170, _steps("llama-8b", 4, 8, 2048, _NO_VOCABULARY)),
    # Inductor would start a pool of compiling processes in each of them.
    Part("tests", 120, _tests, {"TORCHINDUCTOR_COMPILE_THREADS": "1"}),
    Part("fits", 200, _module("fits")),
    Part("profile", 60, _profile),
    Part("tiles", 40, _module("tiles")),
    Part("steps_1b", 200, _steps("llama-1b", 16, 4, 4096, [])),
)
