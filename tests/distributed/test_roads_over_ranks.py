"""By which roads gradients reach an optimizer on two ranks: each is right there too, or refused on all ranks.

All runs are in one job, since starting one takes longer than they do.
"""

from __future__ import annotations

import pytest

from .jobs import results_of_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank has found, by run."""
    return results_of_ranks("roads_program.py", tmp_path_factory.mktemp("roads"))


@pytest.fixture
def found(on_ranks, request) -> list[dict]:
    name = request.node.name.removeprefix("test_").split("[")[0]
    for rank in on_ranks:
        assert "failed" not in rank[name], rank[name]["failed"]
    return [rank[name] for rank in on_ranks]


def test_zero_redundancy(found) -> None:
    """Refused before anything has moved."""
    for rank in found:
        assert "ZeroRedundancyOptimizer around OasisAdamW" in rank["error"] and "fully_shard" in rank["error"]
        assert rank["moved"] == 0


def test_zero_redundancy_of_stock(found) -> None:
    assert all(rank["distance"] < 1e-12 and rank["spread"] == 0 for rank in found), found


def test_bases_apart(found) -> None:
    """A basis that one rank has loaded alone is told at the next backward pass, on all ranks."""
    assert all("the bases of a.weight; b.weight are not the same on all ranks" in rank["error"] for rank in found)


def test_joined(found) -> None:
    """Uneven inputs under `Join` are refused on all ranks, at the first step, and none waits for another."""
    assert all("Join" in rank["error"] and "same number of batches" in rank["error"] for rank in found), found


@pytest.mark.parametrize("road", ["autograd.grad", "no_sync", "foreign", "within backward"])
def test_not_averaged(found, road) -> None:
    """What one rank alone has seen moves no basis and steps no weight."""
    for rank in found:
        assert rank[road].startswith("the gradients of ") and "were not averaged over ranks" in rank[road]
        assert "a.weight" in rank[road] or "b.weight" in rank[road]


@pytest.mark.parametrize("how", ["the same", "wrapped anew", "synchronized anew", "dense", "fsdp"])
def test_thawed(found, how) -> None:
    """A weight that was frozen at `prepare` trains as in one process on the joint batch."""
    assert all(rank[how]["distance"] < 1e-12 and rank[how]["spread"] == 0 for rank in found), found


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp, accumulated"])
def test_made_dense_by_a_hook(found, wrapper) -> None:
    """Bases move at each step all the same, alike on all ranks, and states are low-rank."""
    for rank in found:
        run = rank[wrapper]
        assert run["distance"] < 1e-12 and run["spread"] == 0 and run["moves"] == 5, run
        assert run["shapes"] == ([[8, 4], [12, 4]] if wrapper == "ddp" else [[4, 4], [6, 4]])


def test_state_dicts(found) -> None:
    """`get_state_dict` and `set_state_dict`, whole and in shards: the resumed run is bitwise the uninterrupted one."""
    assert found[0] and all(not any(rank.values()) for rank in found), found
