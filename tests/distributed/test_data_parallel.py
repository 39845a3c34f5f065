"""Data parallel on gloo, under torchrun: the joint batch, equal ranks, what travels, and what ends a job."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from oasis_fx.distributed import prepare

from . import jobs

torchrun, result = partial(jobs.torchrun, "program.py"), partial(jobs.result, "program.py")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_it_trains_as_one_process_on_the_joint_batch(tmp_path, world) -> None:
    found = result("equal", tmp_path, world)
    assert found.pop("report"), "what was sent is not in the report"
    for name, (alone, losses, equal, (sent, early, dense)) in found.items():
        assert losses == pytest.approx(alone, rel=1e-6), name
        assert equal, name
        assert losses[-1] < losses[0] and 0 < sent < 0.7 * dense, (name, sent / dense)
        if name == "plain":  # in small buckets: what is left for the end is statistics
            assert 0.8 * sent < early < sent, (early, sent)
        if name == "accumulated":  # nothing is sent under no_sync()
            assert dense == found["plain"][3][2]


@pytest.mark.slow
def test_a_model_that_nobody_synchronizes_is_refused(tmp_path) -> None:
    """Nor one whose synchronization was taken away."""
    found = result("unsynchronized", tmp_path)
    assert all("call oasis_fx.distributed.prepare(model)" in found[when] for when in ("never", "no more")), found


@pytest.mark.slow
def test_ranks_that_change(tmp_path) -> None:
    found = result("ranks change", tmp_path)
    assert found["losses"] == pytest.approx(found["alone"], rel=1e-6) and found["equal"]
    before, after = found["ranks"]
    assert before == after and len(set(after)) > 1, "no rank has changed"
    assert "torch._dynamo.config.optimize_ddp = False" in found["split"]


@pytest.mark.slow
def test_rules_that_go_by_the_batch_are_refused(tmp_path) -> None:
    done = torchrun("batch rule", tmp_path)
    assert done.returncode != 0 and "from the batch of one rank" in done.stderr


@pytest.mark.slow
def test_trainer(tmp_path) -> None:
    pytest.importorskip("accelerate")
    one, two = result("trainer", tmp_path, 1), result("trainer", tmp_path, 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-3)


@pytest.mark.slow
def test_weights_of_tensor_parallelism_stay_dense(tmp_path) -> None:
    found = result("tensor parallel", tmp_path)
    assert found["tensor parallel"] < 1e-6 and found["stepped"] < 1e-6 and found["reasons"] == ["it is a DTensor"]


@pytest.mark.slow
def test_ranks_with_other_settings_are_found_out(tmp_path) -> None:
    done = torchrun("disagree", tmp_path)
    assert done.returncode != 0 and not (tmp_path / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dies", "hangs"])
def test_a_rank_that_is_lost_ends_the_job_with_an_error(tmp_path, case) -> None:
    start = time.monotonic()
    done = torchrun(case, tmp_path)
    assert done.returncode != 0 and time.monotonic() - start < 55
    assert not (tmp_path / "result.json").exists()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        prepare(torch.nn.Linear(2, 2), bucket_bytes=0)
    with pytest.raises(RuntimeError, match="init_process_group"):
        prepare(torch.nn.Linear(2, 2))
