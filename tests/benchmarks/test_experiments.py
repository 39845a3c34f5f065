"""The harness of the experiments: what is run, kept, taken up again, and how it is summed up."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks.experiments import (
    byte_lm,
    corpus,
    figures,
    finetuning,
    methods,
    run,
    runs,
    scratch,
    sizes,
    sweep,
    training,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    text = torch.tensor(list(b"to be or not to be, that is the question. " * 60), dtype=torch.uint8)
    monkeypatch.setattr(corpus, "load", lambda name: (text[:2000], text[2000:]))
    monkeypatch.setitem(byte_lm.SIZES, "small", (32, 1, 2))
    monkeypatch.setattr(training, "VALIDATION", 4)


FIXED = {"model": "small", "data": "any", "rank": 4, "steps": 3, "batch": 2, "length": 16, "device": "cpu",
         "inner": "aot_eager"}  # fmt: skip


def test_interval_by_hand() -> None:
    mean, half = runs.mean_and_interval([1.0, 2.0, 4.0])
    # Variance (16 + 1 + 25) / 9 / 2 = 7 / 3; t(2) = 4.303.
    assert mean == pytest.approx(7 / 3) and half == pytest.approx(4.303 * math.sqrt(7 / 3 / 3))
    assert math.isnan(runs.mean_and_interval([1.0])[1])


@pytest.mark.slow
def test_every_method_trains(tmp_path) -> None:
    kept = runs.Runs(tmp_path, training.train)
    for name, method in methods.METHODS.items():
        result = kept.result(training.settings(name, method.rates[0], 0, **FIXED))
        assert math.isfinite(result["loss"]) and len(result["validation"]) == 3, name
        assert result["sizes"]["optimizer"] > 0


def test_a_stock_optimizer_has_one_run_for_both_tables_and_sgd_does_not_decay() -> None:
    settings = training.settings
    assert settings("adamw", 1e-3, 0, rank_scaling=True) == settings("adamw", 1e-3, 0)
    assert settings("oja", 1e-3, 0, rank_scaling=True) != settings("oja", 1e-3, 0)
    assert settings("sgd", 1.0, 0)["weight_decay"] == settings("oja-sgd", 1.0, 0)["weight_decay"] == 0.0


def test_seeds_run_at_the_best_rate_and_nothing_runs_twice(tmp_path) -> None:
    done = []

    def train(s, checkpoint):
        done.append((s["lr"], s["seed"], s["steps"]))
        return {"loss": abs(s["lr"] - 0.2) + 0.01 * s["seed"], "median_seconds": 1.0, "sizes": {}}

    kept = runs.Runs(tmp_path, train)
    rates = [0.1, 0.2, 0.4]

    def do(plan) -> None:
        while waiting := [s for s in plan() if kept.known(s) is None]:
            kept.result(waiting[0])

    do(lambda: scratch.plan(kept.known, ["oja"], 3, rates, **FIXED))
    assert done == [(0.1, 0, 3), (0.2, 0, 3), (0.4, 0, 3), (0.2, 1, 3), (0.2, 2, 3)]
    do(lambda: scratch.plan(kept.known, ["oja"], 3, rates, **FIXED))
    assert len(done) == 5
    do(lambda: scratch.longer(kept.known, ["oja", "adamw"], rates, 10, **FIXED))
    assert done[5:] == [(0.2, 0, 30)]  # adamw has no result yet
    (row, missing) = scratch.table(kept.known, ["oja", "adamw"], 3, rates, "adamw", **FIXED)
    assert row[2] == "0.2" and row[3].startswith("0.0100 ± ") and row[4:6] == ["", 3]
    assert missing == ["adamw", "not run"]


def test_methods_are_compared_seed_by_seed() -> None:
    """Seeds differ by far more than methods do: 1, 2, 3 against 0.9, 1.9, 2.8 leave -0.1333 ± 4.303 x sqrt(1/300/3)."""
    by_seed = {"adamw": (1.0, 2.0, 3.0), "oja": (0.9, 1.9, 2.8)}

    def known(s):
        return {"loss": by_seed[s["method"]][s["seed"]], "sizes": {}, "median_seconds": 1.0}

    adamw, oja = scratch.table(known, ["adamw", "oja"], 3, [0.1], "adamw", **FIXED)
    assert adamw[4] == "" and oja[4] == "-0.1333 ± 0.1434"
    assert scratch.table(known, ["adamw"], 3, [0.1], "oja", **FIXED)[0][4] == "0.1333 ± 0.1434"


@pytest.mark.parametrize(
    "method", ["oja", *(pytest.param(name, marks=pytest.mark.slow) for name in ("oja-growing", "oja-exact20"))]
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_losses(tmp_path, method) -> None:
    s = training.settings(method, 3e-3, 0, **{**FIXED, "steps": 6})
    whole = training.train(s, runs.Checkpoint(tmp_path / "none.pt"))

    class Cut(runs.Checkpoint):
        def offer(self, state) -> None:
            torch.save(state(), self.file)
            if len(state()["done"]["losses"]) == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(s, Cut(tmp_path / "half.pt"))
    resumed = training.train(s, runs.Checkpoint(tmp_path / "half.pt"))
    assert resumed["validation"][1:] == whole["validation"][1:] and resumed["loss"] == whole["loss"]


def test_a_sweep_has_each_of_its_points_in_its_table() -> None:
    rows = sweep.table(lambda s: {"loss": 1.0}, None, 2, **FIXED)
    assert len(rows) == len(sweep.RATES) + 2 * len(sweep.RANKS)
    assert [row[1] for row in rows[: len(sweep.RATES)]] == ["0.001", "0.01", "0.1", "1.0", "10.0", "auto"]
    planned = list(sweep.plan(None, 2, **FIXED))
    assert len({str(s) for s in planned}) == len(planned) == 2 * len(rows)


def test_unknown_methods_are_named() -> None:
    with pytest.raises(ValueError, match=r"--methods names 'ojja': it must be of adamw, sgd, oja"):
        methods.known(["oja", "ojja"])


@pytest.mark.parametrize("words", [["--rank", "48"], ["--methods", "oja"]])
def test_a_choice_that_leaves_no_fine_tuning_says_so(tmp_path, words) -> None:
    with pytest.raises(ValueError, match="no run of"):
        run.main(["finetune", *words, "--runs", str(tmp_path), "--out", str(tmp_path)])


def test_what_a_method_keeps() -> None:
    """At d = 32, r = 4: moments are an eighth and bases are added; rules of the gradient keep the activations."""
    adamw, oja, power = (sizes.measure(name, **FIXED) for name in ("adamw", "oja", "gradient_power"))
    assert oja["activations"] < adamw["activations"] <= power["activations"]
    assert oja["gradients"] < adamw["gradients"] and power["optimizer"] < adamw["optimizer"]
    assert all(found["sum"] == sum(v for k, v in found.items() if k != "sum") for found in (adamw, oja, power))


@pytest.mark.slow
def test_figures_of_what_there_is(tmp_path) -> None:
    kept = runs.Runs(tmp_path / "runs", training.train)
    others = FIXED | {"data": "shakespeare", "rank_scaling": True}
    for method, lr, more in (
        *(("oja", 1e-3, {"rank": rank}) for rank in (2, 4, 8)),
        *(("oja", 1e-3, {"backend": {"subspace_lr": rate}}) for rate in (0.1, 1.0, "auto")),
        ("adamw", 1e-3, {"steps": 6}),
        ("oja", 1e-3, {"steps": 6}),
    ):
        kept.result(training.settings(method, lr, 0, **(others | more)))
    made = figures.draw(tmp_path / "runs", tmp_path / "out", steps=3, longer=2)
    drawn = {f"experiments-{name}.svg" for name in ("curves", "drift", "subspace-lr", "rank")}
    assert {file.name for file in made} == drawn | {"experiments-runs.json"}
    # On another machine, which has done one run: the others are kept, and count as done where that is asked for.
    written = json.loads((tmp_path / "out" / "experiments-runs.json").read_text())
    elsewhere = runs.Runs(tmp_path / "other", training.train, figures.kept(tmp_path / "out"))
    assert all(elsewhere.known(run["settings"]) == run["result"] for run in written)
    elsewhere.result(training.settings("pca", 1e-3, 0, **others))
    figures.draw(tmp_path / "other", tmp_path / "out", steps=3, longer=2)
    after = json.loads((tmp_path / "out" / "experiments-runs.json").read_text())
    assert len(after) == len(written) + 1 and all(run in after for run in written)


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.\n#### 1,080", 1080.0), ("It is -2.50!", -2.5), ("none", None), ("in 2024, 5", 5.0)],
)
def test_the_last_number_of_an_answer(text, number) -> None:
    assert finetuning.last_number(text) == number


def test_fine_tuning_is_planned_for_every_method_and_rank() -> None:
    planned = list(finetuning.plan(2, steps=5))
    assert len({str(s) for s in planned}) == len(planned) == 2 * len(finetuning.POINTS)
    sizes = {"gradients": 2**20, "optimizer": 2**20, "saved_activations": 2**20}
    done = {"heldout_before": 1.0, "heldout_after": 0.5, "accuracy": 0.25, "sizes": sizes}
    rows = finetuning.table(lambda s: done if s["method"] == "adamw" else None, 1, steps=5)
    assert rows == [["adamw", "", "0.0001", "1.0000", "0.5000", "0.25", "2", "1"]]
