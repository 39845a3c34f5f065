"""Names of weights, read off placeholders where Dynamo gives no source."""

from __future__ import annotations

import pytest

from oasis_fx.compile.names import _from_placeholder


@pytest.mark.parametrize(
    ("placeholder", "name"),
    [
        ("l_self_modules_fc_parameters_weight_", "fc.weight"),
        ("l_self_parameters_scale_", "scale"),
        (
            "l_self_modules_model_modules_layers_modules_0_modules_self_attn_modules_q_proj_parameters_weight_",
            "model.layers.0.self_attn.q_proj.weight",
        ),
        ("l_weight_", "l_weight_"),
        ("l_self_weight", "l_self_weight"),
    ],
)
def test_from_a_placeholder(placeholder, name) -> None:
    assert _from_placeholder(placeholder) == name
