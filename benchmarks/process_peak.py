"""The highest resident memory of this process since a moment: Linux's VmHWM, which can be reset."""

from __future__ import annotations

from pathlib import Path


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
