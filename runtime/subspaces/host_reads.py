"""Tell where the host may read numbers without waiting for a device."""

from __future__ import annotations

import torch


def reads_are_free(device: torch.device) -> bool:
    """Return whether the host can read numbers on a device without waiting, as it can on the CPU.

    Elsewhere it would wait until the device has done all that it was asked for. An optimizer step reads nothing there:
    whatever depends on a number is decided on the device.
    """
    return device.type == "cpu"
