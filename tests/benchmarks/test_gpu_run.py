"""The GPU run, with small sizes and without a GPU: each part writes what it finds, and none stops the others."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu import run
from benchmarks.gpu.parts import PARTS, Part


def go(monkeypatch, folder, *arguments: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(folder), "--device", "cpu", *arguments])
    run.main()
    return (folder / "summary.txt").read_text().splitlines()


def python(code: str):
    return lambda out, device, tiny: ["-c", code]


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_next_one(monkeypatch, tmp_path) -> None:
    parts = (
        Part("breaks", 60, python("raise SystemExit(3)")),
        Part("hangs", 1, python("import time; time.sleep(60)")),
        Part("ends", 60, python("print('fine')")),
    )
    monkeypatch.setattr(run, "PARTS", parts)
    lines = go(monkeypatch, tmp_path)
    assert [line.split(": ")[0] for line in lines] == ["breaks", "hangs", "ends"]
    assert "exit status 3" in lines[0] and "cut off" in lines[1] and "done" in lines[2]


def test_no_part_begins_when_the_time_is_over(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(run, "PARTS", (Part("one", 60, python("")), Part("two", 60, python(""))))
    assert go(monkeypatch, tmp_path, "--minutes", "0") == ["one: no time was left", "two: no time was left"]


def test_an_unknown_part_is_refused(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        go(monkeypatch, tmp_path, "--parts", "kernel")
    assert "it must be one of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", [part.name for part in PARTS])
def test_every_part_runs(monkeypatch, tmp_path, name) -> None:
    (line,) = go(monkeypatch, tmp_path, "--tiny", "--parts", name)
    assert "done" in line
    if name == "optimizer_step":
        found = json.loads((tmp_path / "optimizer_step.json").read_text())
        assert found["device"] and found["results"][0]["oasis"]["host_ms"] > 0
