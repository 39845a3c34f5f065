"""Runs that are kept: a run is a dict of settings, its result a file named by their hash; one cut off goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

Settings = dict[str, Any]


class Runs:
    """Results by settings, in a folder.

    Args:
        folder: made where it is missing.
        train: does a run: settings and a `Checkpoint` to a result, plain numbers and lists.
        kept: runs of elsewhere that count as done, each a dict of its settings and result.
    """

    def __init__(
        self,
        folder: Path,
        train: Callable[[Settings, Checkpoint], dict[str, Any]],
        kept: Iterable[dict[str, Any]] = (),
    ) -> None:
        self.folder, self.train = folder, train
        self._kept = {key(run["settings"]): run["result"] for run in kept}
        folder.mkdir(parents=True, exist_ok=True)

    def known(self, settings: Settings) -> dict[str, Any] | None:
        file = self._file(settings)
        if file.is_file():
            return json.loads(file.read_text())["result"]
        return self._kept.get(key(settings))

    def result(self, settings: Settings) -> dict[str, Any]:
        """The result of a run: from its file, or by doing it or what is left of it."""
        present = self.known(settings)
        if present is None:
            checkpoint = Checkpoint(self._file(settings).with_suffix(".pt"))
            present = self.train(settings, checkpoint)
            _write(self._file(settings), json.dumps({"settings": settings, "result": present}).encode())
            checkpoint.file.unlink(missing_ok=True)
        return present

    def _file(self, settings: Settings) -> Path:
        return self.folder / f"{key(settings)}.json"


def key(settings: Settings) -> str:
    """The same for equal settings, in whatever order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Checkpoint:
    """The state of a run that is not done, written each ``seconds`` at most."""

    def __init__(self, file: Path, seconds: float = 60.0) -> None:
        self.file, self.seconds, self._last = file, seconds, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        return torch.load(self.file, weights_only=True) if self.file.is_file() else None

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - self._last >= self.seconds:
            new = self.file.with_suffix(".new")
            torch.save(state(), new)
            os.replace(new, self.file)
            self._last = time.monotonic()


def _write(file: Path, content: bytes) -> None:
    new = file.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, file)


# Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (NaN for one value)."""
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    return mean, _T95[count - 1] * math.sqrt(variance / count)


def with_interval(values: list[float]) -> str:
    """``"1.9500 ± 0.0200"``; without the interval for one value, empty for none."""
    if not values:
        return ""
    mean, half = mean_and_interval(values)
    return f"{mean:.4f}" + (f" ± {half:.4f}" if half == half else "")
