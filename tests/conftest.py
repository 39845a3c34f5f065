"""Shared by all tests: golden texts, and a fresh compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the texts in tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/golden/NAME.txt``; a missing file fails, ``--update-golden`` writes it."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            file.write_text(text)
        assert file.is_file(), f"no golden text {file}: run pytest with --update-golden and read what it writes"
        assert text == file.read_text()

    return check


@pytest.fixture
def in_threads() -> Callable[[Callable[[int], None], int], None]:
    """Call a function with 0, 1, .. in as many threads at once, and raise the first failure of any."""

    def run(work: Callable[[int], None], count: int) -> None:
        with ThreadPoolExecutor(count) as pool:
            barrier = Barrier(count)
            running = [pool.submit(lambda number: (barrier.wait(), work(number)), number) for number in range(count)]
        for one in running:
            one.result()

    return run


@pytest.fixture(autouse=True)
def failures_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fault of ours hides behind a warning; processes that a test starts inherit this."""
    monkeypatch.setenv("OASIS_FX_RAISE", "1")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
