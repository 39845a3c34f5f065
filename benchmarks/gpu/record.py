"""Results of one part of the GPU run; the file is written anew with each, so that a part cut short leaves some."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


class Record:
    """The file ``FOLDER/NAME.json``: the device, versions, and the results so far."""

    def __init__(self, folder: str | Path, name: str, device: str) -> None:
        self._file = Path(folder) / f"{name}.json"
        self._found: dict[str, Any] = {**machine(device), "results": []}

    def add(self, result: dict[str, Any]) -> None:
        self._found["results"].append(result)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self._found, indent=1) + "\n")


def machine(device: str) -> dict[str, str]:
    """Return what a figure depends on: the device and the versions of torch and Triton."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}"
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {"device": name, "torch": torch.__version__, "triton": version}
