"""A bad setting is refused when it is given, by name, with what is allowed."""

from __future__ import annotations

import math

import pytest

from oasis_fx import oasis_backend
from oasis_fx.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0: it must be a whole number from 1"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": 1.0}, r"rank is 1\.0: .* between 0 and 1"),
        ({"rank": 0.0}, r"rank is 0\.0"),
        ({"rank": 2.5}, r"rank is 2\.5"),
        ({"rank": math.nan}, "rank is nan"),
        ({"rank": math.inf}, "rank is inf"),
        ({"rank": True}, "rank is True"),
        ({"rank": "32"}, "rank is '32'"),
        ({"rank": None}, "rank is None"),
        ({"rank": {}}, "at least one glob"),
        ({"rank": {"*.q": 0}}, r"rank\['\*\.q'\] is 0"),
        ({"subspace": "galore"}, "subspace is 'galore': it must be one of 'oja'"),
        ({"inner": "eager"}, "inner is 'eager': it must be one of 'inductor', 'aot_eager'"),
        ({"memory_budget": 1.5}, r"memory_budget is 1\.5: it must be a number from 0 to 1"),
        ({"memory_budget": -0.1}, "memory_budget is -0.1"),
        ({"memory_budget": math.nan}, "memory_budget is nan"),
        ({"include": [3]}, r"include is \[3\]"),
        ({"exclude": 7}, "exclude is 7"),
        ({"include": ""}, "include is ''"),
        ({"options": {"custom_partitioner_fn": None}}, "custom_partitioner_fn"),
    ],
)
def test_bad_values(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        oasis_backend(**arguments)


def test_rank_of_a_weight() -> None:
    assert Settings(rank=32).rank_of("a", 100) == 32
    assert Settings(rank=32).rank_of("a", 20) == 20
    assert Settings(rank=0.25).rank_of("a", 100) == 25
    assert Settings(rank=0.001).rank_of("a", 100) == 1
    by_glob = Settings(rank={"*.down.*": 8, "*": 0.5})
    assert by_glob.rank_of("layers.0.down.weight", 100) == 8
    assert by_glob.rank_of("layers.0.up.weight", 100) == 50
    assert Settings(rank={"*.down.*": 8}).rank_of("layers.0.up.weight", 100) is None


def test_reason_to_skip() -> None:
    assert Settings().reason_to_skip("model.layers.0.mlp.up_proj.weight") is None
    assert Settings().reason_to_skip("lm_head.weight") == "output head, excluded by default"
    assert Settings(exclude=()).reason_to_skip("lm_head.weight") is None
    assert Settings(exclude="*.up.*").reason_to_skip("a.up.weight") == "excluded by '*.up.*'"
    assert Settings(include=["*.up.*"]).reason_to_skip("a.down.weight") == "not in include"
    assert Settings(rank={"*.up.*": 4}).reason_to_skip("a.down.weight") == "no glob of rank names it"


def test_settings_compare_and_cannot_be_changed() -> None:
    assert oasis_backend(rank=4).settings == oasis_backend(rank=4).settings != oasis_backend(rank=8).settings
    with pytest.raises(AttributeError):
        oasis_backend(rank=4).settings.rank = 8
    with pytest.raises(TypeError):
        oasis_backend(rank={"*": 4}).settings.rank["*"] = 8
