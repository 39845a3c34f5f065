"""FSDP2 on gloo, under torchrun: the joint batch, equal bases, what travels, checkpoints on other numbers of ranks."""

from __future__ import annotations

from functools import partial

import pytest

from . import jobs

result = partial(jobs.result, "fsdp_program.py")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_it_trains_as_one_process_on_the_joint_batch(tmp_path, world) -> None:
    """Losses and clipped norms; each rank has the moments of its rows, and the same bases."""
    found = result("equal", tmp_path, world)
    assert ("hybrid" in found) == (world == 4)
    for name, run in found.items():
        for kind in (0, 1):
            assert run["losses"][kind] == pytest.approx(run["alone"][kind], rel=1e-9), name
        assert run["equal"], name
        assert run["losses"][0][-1] < run["losses"][0][0] and 0 < run["sent"] < 0.7 * run["dense"], name
        shards = world // 2 if "hybrid" in name else world
        assert [rows for rows, _ in run["moments"]][:2] == [-(-203 // shards), 64 // shards], name
    if world == 2:
        assert found["auto"]["ranks"] != [16, 51], "no rank has changed"


@pytest.mark.slow
def test_checkpoints_on_as_many_ranks_and_on_others(tmp_path) -> None:
    """By torch.distributed.checkpoint; a checkpoint of all rows, which `resize_checkpoint` makes, loads too."""
    saved = result("save", tmp_path, 2)
    assert saved["shapes"] == [[64, 4], [203, 4]]
    for world in (2, 4, 1):
        for kind, rest in result("load", tmp_path, world).items():
            for one, other in zip(rest, saved["rest"], strict=True):
                assert one == pytest.approx(other, rel=0 if world == 2 else 1e-9), (world, kind)


@pytest.mark.slow
def test_mixed_precision(tmp_path) -> None:
    found = result("bfloat16", tmp_path)
    assert found["losses"][-1] < 0.5 * found["losses"][0] and found["dtypes"] == ["torch.float32"]


@pytest.mark.slow
def test_what_is_refused_or_left_out(tmp_path) -> None:
    found = result("refused", tmp_path)
    assert "OasisMuon needs all rows" in found["muon"]
    assert "state_bits must be 32" in found["eight bits"]
    assert "rank is 4: the rank of sharded weights cannot change" in found["resize"]
    assert "sharded by dimension 1: oasis_fx needs its rows sharded" in found["columns"]
    assert "meshes of several sets of ranks" in found["several meshes"]
    assert "call oasis_fx.distributed.prepare(model) after fully_shard" in found["not synchronized"]
    assert all(found["not finite"]), "a step was taken although a gradient of another rank is not finite"


@pytest.mark.slow
def test_a_divide_factor_holds_for_low_rank_gradients_too(tmp_path) -> None:
    """`set_gradient_divide_factor(3)` on two ranks: every gradient is two thirds of the mean."""
    found = result("divided", tmp_path)
    assert found == pytest.approx({"dense": 2 / 3, "low-rank": 2 / 3}, rel=1e-9)
