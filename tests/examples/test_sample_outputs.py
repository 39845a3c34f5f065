"""The sample outputs in docs/commands.md are what the commands print; run as a module, it writes them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
BLOCK = re.compile(r"^```\n\$ (?P<command>oasis-fx [^\n]+)\n(?P<output>.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = {found["command"]: found["output"] for found in BLOCK.finditer(PAGE.read_text())}


def output_of(command: str) -> str:
    """What a command prints; lines end where their last letter does."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "oasis_fx", *shlex.split(command)[1:]], capture_output=True, text=True, check=True
    )
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    "command", [pytest.param(one, marks=pytest.mark.slow if " plan " in one else ()) for one in BLOCKS]
)
def test_a_sample_is_what_the_command_prints(command) -> None:
    if " plan " in command:
        pytest.importorskip("transformers")
    assert output_of(command) == BLOCKS[command], "python -m tests.examples.test_sample_outputs writes it anew"


def test_both_commands_have_a_sample() -> None:
    assert {command.split()[1] for command in BLOCKS} == {"explain", "plan"} and all(BLOCKS.values())


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda b: f"```\n$ {b['command']}\n{output_of(b['command'])}```", PAGE.read_text()))
