"""The command line: what it shows, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from oasis_fx.__main__ import main

ROOT = Path(__file__).parents[2]

MODEL = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4)), torch.randn(9, 16)

def by_keyword():
    return torch.nn.Linear(16, 4), {"input": torch.randn(9, 16)}

def wrong():
    return 3
"""


@pytest.fixture
def target(tmp_path, monkeypatch) -> str:
    (tmp_path / "some_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return "some_model:build"


def test_explain(target, capsys) -> None:
    assert main(["explain", target, "--rank", "4"]) == 0
    out = capsys.readouterr().out
    assert "0.weight" in out and "24 x 16" in out and "stock torch.compile" in out


def test_print_all_graphs_and_one(target, capsys) -> None:
    assert main(["print", target, "--rank", "4"]) == 0
    out = capsys.readouterr().out
    assert [out.count(f"def {name}(") for name in ("joint", "forward", "backward")] == [2, 1, 1]
    assert main(["print", target, "--rank", "4", "--graph", "after"]) == 0
    out = capsys.readouterr().out
    assert out.count("def ") == 1 and 'f32[9, 4]" = aten.mm.default(primals_3, basis_0)' in out


def test_diff_has_no_color_in_a_pipe(target, capsys) -> None:
    assert main(["print", target, "--rank", "4", "--diff"]) == 0
    plain = capsys.readouterr().out
    assert "\033" not in plain and " > " in plain and "before" in plain.splitlines()[0]
    assert main(["print", target, "--rank", "4", "--diff", "--color", "always"]) == 0
    assert "\033[32m" in capsys.readouterr().out


def test_formats(target, capsys) -> None:
    assert main(["print", target, "--rank", "4", "--format", "table", "--graph", "after"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# after\n\nname") and "+G" in out and "aten.addmm.default" in out
    assert main(["print", target, "--rank", "4", "--format", "dot"]) == 0
    assert capsys.readouterr().out.count("digraph") == 4
    assert main(["print", target, "--rank", "4", "--format", "html", "-o", "graphs.html"]) == 0
    assert capsys.readouterr().out == "" and Path("graphs.html").read_text(encoding="utf-8").count("<svg ") == 4


def test_only(target, capsys) -> None:
    assert main(["print", target, "--rank", "4", "--only", "2", "--graph", "after"]) == 0
    out = capsys.readouterr().out
    assert "# Only 2:" in out and "_2_weight" in out and "_0_weight" not in out
    assert main(["print", target, "--rank", "4", "--only", "2", "--graph", "after", "--format", "table"]) == 0
    assert "_0_weight" not in capsys.readouterr().out


def test_explain_writes_a_page_and_the_tables(target, capsys) -> None:
    assert main(["explain", target, "--rank", "4", "--html", "report.html", "--only", "2"]) == 0
    assert "stock torch.compile" in capsys.readouterr().out
    page = Path("report.html").read_text(encoding="utf-8")
    assert "oasis_fx on some_model:build" in page and "2, before and after" in page


def test_other_targets(target, tmp_path, capsys) -> None:
    assert main(["explain", "some_model:by_keyword", "--rank", "0.25"]) == 0
    assert "4 x 16" in capsys.readouterr().out
    assert main(["explain", f"{tmp_path}/some_model.py:build", "--inner", "aot_eager", "--dynamic"]) == 0
    assert "0.weight" in capsys.readouterr().out


def test_settings_reach_the_passes(target, capsys) -> None:
    assert main(["explain", target, "--rank", '{"2.*": 3}', "-o", "report.txt"]) == 0
    assert capsys.readouterr().out == ""
    text = Path("report.txt").read_text()
    assert "no glob of rank names it" in text and "2.weight" in text
    assert main(["explain", target, "--exclude", "0.*"]) == 0
    assert "excluded by '0.*'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "some_model:build", "--rank", "0"], "rank is 0"),
        (["explain", "some_model:build", "--rank", "many"], "rank is 'many'"),
        (["explain", "some_model:build", "--memory-budget", "2"], "memory_budget is 2.0"),
        (["explain", "some_model:build", "--subspace-every", "0"], "every is 0"),
        (["explain", "some_model:build", "--inner", "eager"], "invalid choice"),
        (["explain", "some_model:nothing"], "nothing"),
        (["explain", "no_such_module:build"], "no_such_module"),
        (["explain", "no_such_file.py:build"], "no_such_file.py"),
        (["explain", "some_model"], "some_model"),
        (["explain", "some_model:wrong"], "model, example_inputs"),
        (["print", "some_model:build", "--graph", "middle"], "invalid choice"),
        (["explain", "some_model:build", "--include", "layers.*"], "no weight matches 'layers.*'"),
        (["print", "some_model:build", "--only", "layers"], "nothing belongs to 'layers'"),
        (["explain", "some_model:build", "--html", "x.html", "--only", "layers"], "belongs to 'layers'"),
        (["print", "some_model:build", "--diff", "--format", "dot"], "--diff shows"),
        (["print", "some_model:build", "--diff", "--only", "2"], "--diff shows"),
        (["print", "some_model:build", "--format", "svg"], "invalid choice"),
        ([], "command"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(arguments, message, target, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize("command", [["-m", "oasis_fx"], ["-P", "-m", "oasis_fx"]])
def test_as_a_module_on_an_example(command) -> None:
    done = subprocess.run(
        [sys.executable, *command, "explain", "mlp", "--rank", "4"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2.weight" in done.stdout
