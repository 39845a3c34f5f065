"""Tests that start a job of several processes run one at a time, whatever the number of pytest's workers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from filelock import FileLock


@pytest.fixture(autouse=True)
def one_job_at_a_time(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two jobs of four ranks on two cores take longer than one after the other, and may run into their timeouts."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "distributed.lock"):
        yield
