"""Compile a Triton kernel for a GPU that is not here, and count the instructions that a thread executes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)([^;]*)")


@dataclass(frozen=True)
class Code:
    """What a kernel is on a GPU.

    Attributes:
        instructions: address, name and operands of each.
        stack: bytes of a thread's local memory, in which spilled registers lie.
        shared: bytes of shared memory of a block of threads.
    """

    instructions: tuple[tuple[int, str, str], ...]
    registers: int
    stack: int
    shared: int

    def executed(self, outer: int, inner: int) -> int:
        """Count the instructions that one thread executes, given the rounds of the outer loop and of the inner one."""
        loops = {
            (int(target[1], 16), place)
            for place, name, operands in self.instructions
            if name.startswith("BRA")
            and (target := re.search(r"0x([0-9a-f]+)", operands))
            and int(target[1], 16) < place
        }
        times = {}
        for place, _, _ in self.instructions:
            depth = sum(start <= place <= stop for start, stop in loops)
            times[place] = (1, outer, outer * inner)[depth]
        return sum(times.values())

    def spills(self) -> bool:
        """Whether anything is in local memory."""
        return self.stack > 0 or any(name.startswith(("LDL", "STL")) for _, name, _ in self.instructions)


def build(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: int | None
) -> Code:
    """Compile a kernel whose pointers and ints 16 divides, but for those that it does not specialise."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    free = {names.index(name) for name in ("seed", "tensors") if name in names}
    divided = [i for i, name in enumerate(names) if signature[name][0] in "*i" and i not in free]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in divided},
    )
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([BIN / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    found = tuple((int(place, 16), name, operands) for place, name, operands in INSTRUCTION.findall(text))
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Code(found, numbers["REG"], numbers["STACK"], made.metadata.shared)
