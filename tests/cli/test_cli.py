"""The command line: what it shows, and how it refuses."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from oasis_fx.__main__ import main
from oasis_fx.cli.parser import make_parser
from oasis_fx.cli.progress import Progress

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


def said(stderr: str) -> list[str]:
    """What stands on stderr but for progress, of which a slow machine sees more."""
    return [line for line in stderr.splitlines() if not line.endswith(" s so far)")]


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
    assert capsys.readouterr().out.count("digraph") == 1  # one file that is valid, with a cluster for each graph
    assert main(["print", target, "--rank", "4", "--format", "html", "-o", "graphs.html"]) == 0
    assert capsys.readouterr().out == "" and Path("graphs.html").read_text(encoding="utf-8").count("<svg ") == 4
    assert main(["print", target, "--rank", "4", "--format", "svg"]) == 0
    drawing = ElementTree.fromstring(capsys.readouterr().out)
    titles = [text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "title"]
    assert titles == ["before", "after"]
    assert main(["print", target, "--rank", "4", "--format", "svg", "--graph", "forward"]) == 0
    assert capsys.readouterr().out.count('class="title"') == 1


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
        (["print", "some_model:build", "--format", "png"], "invalid choice"),
        (["explain", "some_model:build", "--seq", "8"], "--seq goes with a model that is given by its name"),
        (["explain", "no_such_model"], "a sample is mlp or tiny_llama"),
        (["explain", "folder"], "folder without a config.json"),
        (["explain", "some_model:build", "-o", "nowhere/x.txt"], "there is no folder 'nowhere'"),
        (["explain", "some_model:build", "--html", "folder"], "--html is 'folder': it is a folder"),
        (["print", "some_model:build", "-o", "folder"], "-o is 'folder': it is a folder"),
        (["plan", "SmolLM2-135M", "--chart", "x.foo"], "its ending must be one of"),
        (["plan", "SmolLM2-135M", "--json", "nowhere/x.json"], "--json is 'nowhere/x.json'"),
        (["plan", "SmolLM2-135M", "--seq", "999999"], "--seq is 999999: the model has 131072 positions"),
        ([], "command"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(arguments, message, target, capsys, monkeypatch) -> None:
    Path("folder").mkdir()
    monkeypatch.setattr("oasis_fx.plan.methods.Planner.rows", lambda *given: pytest.fail("a refusal comes first"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("oasis-fx") and ": error: " in last and message in last


def test_a_model_that_fails_as_it_runs_is_told_in_one_line(target, capsys) -> None:
    with Path("some_model.py").open("a") as file:
        file.write("\ndef fails():\n    return torch.nn.Linear(16, 4), torch.randn(9, 15)\n")
    assert main(["explain", f"{Path.cwd()}/some_model.py:fails"]) == 1
    err = capsys.readouterr().err
    assert "oasis-fx: explain failed: TorchRuntimeError: " in err and "[9, 15] X [16, 4]" in err
    assert "--debug" in err and "Traceback" not in err
    with pytest.raises(Exception, match="same reduction dim"):
        main(["explain", f"{Path.cwd()}/some_model.py:fails", "--debug"])


@pytest.mark.parametrize("command", ["print", "explain", "plan"])
def test_help_has_examples_and_exit_codes(command, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "exit codes: 0" in text
    examples = re.findall(rf"^  (oasis-fx {command} .*?)(?:  |$)", text, re.M)
    assert len(examples) >= 4
    for example in examples:  # each is at least a line that the parser takes
        make_parser().parse_args(example.split()[1:])


@pytest.mark.parametrize("command", [["-m", "oasis_fx"], ["-P", "-m", "oasis_fx"]])
def test_as_a_module_on_a_sample_from_any_folder(command, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, *command, "explain", "mlp", "--rank", "4"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2.weight" in done.stdout and said(done.stderr) == []


def test_a_model_by_its_name(tmp_path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=9, num_attention_heads=4, vocab_size=300
    )
    config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--blocks", "1", "--seq", "24", "--rank", "4", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj.weight" in out and "layers.1" not in out
    assert "stock torch.compile" in out


def test_progress_tells_what_is_done_and_is_gone_at_the_end() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (io.StringIO(), Terminal()):
        with Progress(stream, after=0.0) as progress:
            progress.tell("compiling")
            progress.tell("compiling")
            progress.tell("drawing")
        text = stream.getvalue()
        assert "compiling (0 s so far)" in text and "drawing (0 s so far)" in text
        assert text.endswith("\r\033[K") == stream.isatty()
    stream = io.StringIO()
    with Progress(stream, after=1000.0) as progress:
        progress.tell("compiling")
    assert stream.getvalue() == ""  # nobody needs a word on what is done at once


def test_a_reader_that_has_seen_enough(tmp_path) -> None:
    command = f"{sys.executable} -P -m oasis_fx print mlp --rank 4 | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("# before") and said(done.stderr) == []
