"""Where the host may look at numbers: it waits for no device then."""

from __future__ import annotations

import torch


def reads_are_free(device: torch.device) -> bool:
    """Return whether reading a number of a device costs nothing, as on the CPU.

    Elsewhere the host would wait until the device has done all that it was asked for. An optimizer step reads nothing
    there: what it depends on is decided on the device.
    """
    return device.type == "cpu"
