"""A pytest plugin: outcome and failure of each test in a file as soon as it is known, for a run that may be cut off."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and not report.failed:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # the controller hears of it too
    with Path(os.environ["OASIS_FX_REPORT"]).open("a") as file:
        file.write(f"{report.outcome} {report.duration:.0f} s {report.nodeid}\n")
        if report.failed:
            file.write(f"{report.longreprtext[-3000:]}\n\n")
