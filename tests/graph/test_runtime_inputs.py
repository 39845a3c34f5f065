"""One order of the runtime's inputs: positions, names, kinds and values agree."""

from __future__ import annotations

import pytest

from oasis_fx.graph.runtime_inputs import RUNTIME_INPUTS, RuntimeInputs


@pytest.mark.parametrize("has_energy", [False, True])
@pytest.mark.parametrize("has_control", [False, True])
@pytest.mark.parametrize("has_tail", [False, True])
def test_values_stand_where_their_positions_and_names_say(has_energy: bool, has_control: bool, has_tail: bool) -> None:
    layout = RuntimeInputs(5, 2, 3, has_energy, has_control, has_tail)
    given = {kind: [f"{kind}_{index}" for index in range(3 if kind == "slot" else 2)] for kind in RUNTIME_INPUTS}
    values = layout.in_order(**given)
    names = layout.names()
    assert tuple(names.values()) == values
    assert list(names) == list(layout.kinds()) == list(range(5, 5 + len(values)))
    assert len(values) == 2 + 2 * (has_energy + has_control + has_tail) + 3
    for kind in RUNTIME_INPUTS:
        for index, name in enumerate(given[kind]):
            position = layout.position(kind, index)
            assert (position is None) == (
                not {"energy": has_energy, "control": has_control, "tail": has_tail}.get(kind, True)
            )
            if position is not None:
                assert names[position] == name and layout.kinds()[position] == kind
