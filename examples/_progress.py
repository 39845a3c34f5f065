"""One line that says what a run is doing, and for how long, while it waits for it."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from tqdm import tqdm


class Progress:
    """A bar of training steps whose words say what is done now, with its seconds, also where no step ends.

    Args:
        steps: of training, all together.
        stream: where to write; stderr by default.
    """

    def __init__(self, steps: int, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._bar = tqdm(total=steps, desc="starting", unit="step", file=stream, disable=False)
        self._what, self._since = "starting", time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._repeat, args=(1.0 if stream.isatty() else 15.0,), daemon=True)
        self._thread.start()

    def doing(self, what: str) -> None:
        """Say what is done from now on; of the same as before, the seconds go on."""
        if what != self._what:
            self._what, self._since = what, time.monotonic()
            self._bar.set_description(what)

    def skip(self, steps: int) -> None:
        """Count steps that an earlier run has done."""
        self._bar.n = self._bar.initial = steps
        self._bar.refresh()

    def stepped(self, **losses: float) -> None:
        """Count a step, and show the losses."""
        self._bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Say that all is done."""
        self._over.set()
        self._thread.join()
        self._bar.set_description("done")
        self._bar.close()

    def _repeat(self, pause: float) -> None:
        while not self._over.wait(pause):
            self._bar.set_description(f"{self._what}, {time.monotonic() - self._since:.0f} s")
