"""torchtitan's own entry point on a machine without an accelerator, with gloo.

    torchrun --nproc-per-node 2 examples/torchtitan/train_on_cpu.py --module llama_oasis --config debug_on_cpu

Where no accelerator is found, torchtitan 0.3 takes "cuda" (torchtitan/tools/utils.py, `get_device_info`), and its
trainer fails at `device_module.set_device`. No setting says otherwise, so the two names that the rest of torchtitan
imports from there are set before it does. Its files stay as they are; docs/torchtitan.md has the issue to file.

torchtitan 0.3.0 is made for torch 2.14: after its first step it calls `torch.distributed.set_timeout`, which torch 2.13
has under a private name alone.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import torch
import torchtitan.tools.utils

MISSING = "torchtitan was imported before train_on_cpu: import it first, since other modules copy the names it sets"


class CpuDevice:
    """What torchtitan asks of `torch.cuda`, for the CPU: one device, whose memory nobody counts."""

    def device_count(self) -> int:
        return 1

    def set_device(self, device: object) -> None:
        pass

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: object = None) -> None:
        pass

    def get_device_name(self, device: object = None) -> str:
        return "CPU"

    def get_device_properties(self, device: object = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))

    def memory_stats(self, device: object = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def use_cpu() -> None:
    """Have torchtitan train on the CPU; called before the rest of torchtitan is imported."""
    if "torchtitan.trainer" in sys.modules:
        raise RuntimeError(MISSING)
    torchtitan.tools.utils.device_type = "cpu"
    torchtitan.tools.utils.device_module = CpuDevice()
    if not hasattr(torch.distributed, "set_timeout"):  # before torch 2.14
        torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout


if __name__ == "__main__":
    use_cpu()
    from torchtitan.train import main

    main()
