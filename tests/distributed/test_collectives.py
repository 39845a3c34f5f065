"""Collectives on low-rank gradients, on two ranks: what each leaves is what it leaves of dense ones."""

from __future__ import annotations

import pytest

from .jobs import results_of_ranks


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return results_of_ranks("collectives_program.py", tmp_path_factory.mktemp("collectives"))


@pytest.mark.parametrize("bases", ["one basis", "two bases"])
def test_they_are_right_whether_ranks_share_a_basis_or_not(on_ranks, bases) -> None:
    """A broadcast is one of the factor where the basis is one."""
    for rank in on_ranks:
        ways = {name: found for name, found in rank.items() if name.endswith(bases)}
        assert len(ways) == 21
        for name, found in ways.items():
            assert isinstance(found, list), (name, found)
            error, low_rank = found
            assert error < 1e-12, (name, error)
            if name.startswith("broadcast"):
                assert low_rank == (bases == "one basis"), name
