"""Names of weights, read off placeholders where Dynamo gives no source."""

from __future__ import annotations

import pytest
import torch

from oasis_fx import oasis_backend
from oasis_fx.compile import names
from oasis_fx.compile.names import _from_placeholder, weight_name


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


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['args'][0]._modules['model']._modules['fc']._parameters['weight']", "model.fc.weight"),  # Accelerate, bf16
        ("L['args'][1]._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['fn'].args[0]._modules['fc']._parameters['weight']", "fc.weight"),  # functools.partial
        ("L['wrapper'].forward.__self__._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self'].model._modules['fc']._parameters['weight']", "model.fc.weight"),
        ("L['models'][0]._modules['fc']._parameters['weight']", "0.fc.weight"),
        ("L['self']._modules['0']._parameters['weight']", "0.weight"),
    ],
)
def test_from_a_source(monkeypatch, source, name) -> None:
    monkeypatch.setattr(names, "input_source", lambda placeholder: source)
    assert weight_name(None) == name


def test_a_glob_without_a_match_is_told_with_a_few_names() -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(40)))
    compiled = torch.compile(net, backend=oasis_backend(rank=2, include=["17.wait"], inner="aot_eager"))
    with pytest.raises(ValueError, match=r"no weight matches '17\.wait'") as found:
        compiled(torch.randn(2, 4))
    message = str(found.value)
    assert "17.weight" in message and "35 others; names are those of model.named_parameters()" in message
    assert len(message) < 250
