"""Say on stderr what a command is busy with, once that takes long."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

_AFTER = 5.0  # seconds without a word: what is done by then needs none
_ON_TERMINAL, _ELSEWHERE = 1.0, 30.0  # seconds from one word to the next


class Progress:
    """Tell what is being done, and for how many seconds the command has run.

    A terminal has one line, which is written anew each second and cleared at the end. Elsewhere, as in a log, there is
    a line for each thing that is done, and one each half minute.

    Args:
        stream: where to write; stderr by default.
        after: seconds before the first word.
    """

    def __init__(self, stream: TextIO | None = None, after: float = _AFTER) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._after, self._start = after, time.monotonic()
        self._what = "starting"
        self._written = ""
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def tell(self, what: str) -> None:
        """Note what is done from now on."""
        self._what = what
        if self._seconds() >= self._after and (self._on_terminal or what != self._written):
            self._write()

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        if self._on_terminal and self._written:
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _repeat(self) -> None:
        pause = self._after
        while not self._done.wait(pause):
            self._write()
            pause = _ON_TERMINAL if self._on_terminal else _ELSEWHERE

    def _write(self) -> None:
        with self._lock:
            self._written = self._what
            line = f"oasis-fx: {self._what} ({self._seconds():.0f} s so far)"
            self._stream.write(f"\r\033[K{line}" if self._on_terminal else f"{line}\n")
            self._stream.flush()

    def _seconds(self) -> float:
        return time.monotonic() - self._start
